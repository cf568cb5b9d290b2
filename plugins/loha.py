"""LoHa: `ΔW = s · (A1 B1) ∘ (A2 B2)`, the entrywise product of two low-rank matrices (arXiv:2108.06098, section 2.2).

The product has thin factors of rank r², rows of A1 and A2 multiplied pairwise and columns of B1 and B2 too, so that no
`out × in` matrix is made where r² is small. Kernels of convolutions can be factored further (proposition 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from peftc.plugin import (
    CONV_KINDS,
    EXPERT_KINDS,
    LINEAR_KINDS,
    Diagnostic,
    ExpertsMixin,
    Field,
    Kind,
    LayerFacts,
    LayersMixin,
    MapTuner,
    ModuleNode,
    ModulesToSaveMixin,
    PeftConfig,
    PeftType,
    RankMixin,
    Slot,
    SlotInit,
    TargetsMixin,
    TunerMethod,
    UpdateDropoutMixin,
    View,
    hookimpl,
    kept_outputs,
    parameter_slot,
    rules,
)

if TYPE_CHECKING:
    from torch import Tensor


class LoHaConfig(
    TargetsMixin, ExpertsMixin, LayersMixin, RankMixin, UpdateDropoutMixin, ModulesToSaveMixin, PeftConfig
):
    """Options of a LoHa adapter, named as in the reference. The update can have any rank up to `r` squared."""

    peft_type: PeftType | None = PeftType("LOHA")
    alpha: int | float = 8
    """Numerator of the scaling `alpha / r`."""
    use_effective_conv2d: bool = False
    """Factor the kernels of convolutions larger than one point as well."""
    init_weights: bool = True
    """Start one factor at zero, which changes nothing; otherwise all at random."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some modules: pattern over the end of the path -> `r`."""
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)
    """Other numerators for some modules: pattern over the end of the path -> `alpha`."""

    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}


class _Product(MapTuner[LoHaConfig]):
    """Storage, and merging."""

    additive = True

    def slots(self, c: LoHaConfig, layer: LayerFacts) -> Iterable[Slot]:
        out, channels = layer.out_features, layer.in_features // layer.groups
        effective = _is_effective(c, layer)
        for factor in ("hada_w1", "hada_w2"):
            if effective:
                kernel = layer.kernel if len(layer.kernel) > 1 else (*layer.kernel, 1)
                yield parameter_slot(factor.replace("w", "t"), (c.r, c.r, *kernel))
                yield parameter_slot(f"{factor}_a", (c.r, out))
                yield parameter_slot(f"{factor}_b", (c.r, channels))
            else:
                yield parameter_slot(f"{factor}_a", (out, c.r))
                yield parameter_slot(f"{factor}_b", (c.r, channels * math.prod(layer.kernel)))

    def init(self, c: LoHaConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        for name in sorted(slots, key=lambda name: ("t" in name, name)):
            if name == "hada_w2_b" and c.init_weights:
                init.zeros(slots[name])
            else:
                init.kaiming_uniform(slots[name], math.sqrt(5))

    def scaling(self, c: LoHaConfig, layer: LayerFacts) -> float:
        return c.alpha / c.r

    def check(self, c: LoHaConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        limit = min(_inputs(layer), layer.out_features)
        if c.r > limit:
            yield rules.RANK_BEYOND_LAYER(
                f"Rank {c.r} is beyond what a factor of `{path}` can have ({limit})",
                fix=f"Set `r`, or a `rank_pattern` for it, to at most {limit}.",
                where=path,
            )

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        import torch

        a1, b1, a2, b2 = _factors(a)
        return {**p, "weight": torch.addcmul(p["weight"], (_scaled(a, a1)) @ b1, a2 @ b2)}


class Folded(_Product):
    """For ranks whose square is not small, and grouped convolutions: the weight changes, and the layer runs once."""

    supports = LINEAR_KINDS | CONV_KINDS | EXPERT_KINDS


class Thin(_Product):
    """Two thin products of rank r²."""

    supports = LINEAR_KINDS | CONV_KINDS | EXPERT_KINDS

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        a1, b1, a2, b2 = _factors(a)
        a1 = _kept(a, a1)
        A = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
        B = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
        layer = a.layer
        if layer.kernel:
            A = A.view(-1, layer.in_features, *layer.kernel)
            B = B.view(*B.shape, *(1 for _ in layer.kernel))
        return A, B, a.scaling


class Lookup(_Product):
    """For embeddings: columns of both products for the ids at hand."""

    supports = frozenset({Kind.EMBEDDING})

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        from torch.nn.functional import embedding

        first = embedding(x, a.hada_w1_b.t()) @ _scaled(a, a.hada_w1_a).t()
        second = embedding(x, a.hada_w2_b.t()) @ a.hada_w2_a.t()
        return first * second


def _is_effective(c: LoHaConfig, layer: LayerFacts) -> bool:
    return c.use_effective_conv2d and math.prod(layer.kernel) > 1


def _inputs(layer: LayerFacts) -> int:
    return layer.in_features // layer.groups * math.prod(layer.kernel)


def _factors(a: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A1 `(out, r)`, B1 `(r, in · kernel)`, A2, B2."""
    a1, b1, a2, b2 = a.hada_w1_a, a.hada_w1_b, a.hada_w2_a, a.hada_w2_b
    if _is_effective(a.config, a.layer):  # type: ignore[arg-type]  # this plugin's config
        return a1.t(), _kernels(a.hada_t1, b1), a2.t(), _kernels(a.hada_t2, b2)
    return a1, b1, a2, b2


def _kernels(core: Tensor, channels: Tensor) -> Tensor:
    """`(r, in · kernel)` from the core `(r, r, *kernel)` and the channels' factor `(r, in)`."""
    import torch

    return torch.einsum("pqk,qi->pik", core.flatten(2), channels).flatten(1)


def _kept(a: View, first: Tensor) -> Tensor:
    """A1 with the rows left that are not dropped."""
    c = a.config
    assert isinstance(c, LoHaConfig)
    if not a.training:
        return first
    kept = kept_outputs(first.shape[0], c.rank_dropout, c.module_dropout, True, first)
    return first if kept is None else first * kept.unsqueeze(1)


def _scaled(a: View, first: Tensor) -> Tensor:
    return _kept(a, first) * a.scaling


FOLDED, THIN, LOOKUP = Folded(), Thin(), Lookup()


def tuner_for(c: LoHaConfig, node: ModuleNode) -> MapTuner[LoHaConfig]:
    """Thin products where they are cheaper than the gradient of a whole weight, forward and backward counted."""
    layer = node.facts
    if layer.kind is Kind.EMBEDDING:
        return LOOKUP
    ins, outs = _inputs(layer), layer.out_features
    return THIN if layer.groups == 1 and 3 * c.r**2 * (ins + outs) < ins * outs else FOLDED


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "LOHA",
        LoHaConfig,
        tuner_for,
        choices=(THIN, FOLDED, LOOKUP),
        prefix="hada_",
        layer_names=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        layer_options={name: name for name in ("r", "alpha", "rank_dropout", "module_dropout")},
        model_class="LoHaModel",
        layer_class="LoHaLayer",
        default_targets={"target_modules": "loha"},
        summary="The entrywise product of two low-rank updates beside each frozen weight.",
        paper="arXiv:2108.06098",
        tags=("loha",),
        examples=({"r": 1}, {"r": 4, "alpha": 16}, {"r": 2, "use_effective_conv2d": True}),
        identity_at_start=lambda c: c.init_weights,
    )
