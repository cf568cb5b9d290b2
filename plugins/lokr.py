"""LoKr: `ΔW = s · C ⊗ D`, a Kronecker product whose factors may be low-rank themselves (arXiv:2309.14859, section 3.3).

Linear layers apply it as two small products, `(C ⊗ D) vec(X) = vec(D X C^T)`, so the `out × in` matrix is made only to
merge, and for convolutions, whose weight is small beside what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from peftc.plugin import (
    CONV_KINDS,
    EXPERT_KINDS,
    LINEAR_KINDS,
    ExpertsMixin,
    Field,
    Kind,
    LayerFacts,
    LayersMixin,
    MapTuner,
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
)

if TYPE_CHECKING:
    from torch import Tensor


class LoKrConfig(
    TargetsMixin, ExpertsMixin, LayersMixin, RankMixin, UpdateDropoutMixin, ModulesToSaveMixin, PeftConfig
):
    """Options of a LoKr adapter, named as in the reference. A factor of at most twice the rank is stored whole."""

    peft_type: PeftType | None = PeftType("LOKR")
    alpha: int | float = 8
    """Numerator of the scaling `alpha / r`."""
    use_effective_conv2d: bool = False
    """Factor the kernels of convolutions larger than one point as well."""
    decompose_both: bool = False
    """Let the first, smaller factor be low-rank too."""
    decompose_factor: int = Field(default=-1, ge=-1)
    """Size of the first factor, or the nearest below it that divides; -1 makes both about equally large."""
    rank_dropout_scale: bool = False
    """Scale what `rank_dropout` leaves so that its mean stays."""
    init_weights: bool | Literal["lycoris"] = True
    """Start the first factor at zero (`lycoris`: the second), which changes nothing; `false` starts both at random."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some modules: pattern over the end of the path -> `r`."""
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)
    """Other numerators for some modules: pattern over the end of the path -> `alpha`."""

    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `dimension`, the first near `factor`, or with -1 near the square root.

    >>> factorization(128), factorization(127), factorization(128, 4), factorization(12, 5)
    ((8, 16), (1, 127), (4, 32), (3, 4))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    first = max(1, int(math.sqrt(dimension)) if factor == -1 else min(factor, int(math.sqrt(dimension))))
    while dimension % first:  # a few steps, and nothing that a compiler could not follow
        first -= 1
    return first, dimension // first


class _Shape(NamedTuple):
    """The factors of a layer: C is `(outs, ins)`, D `(out, in, *kernel)`."""

    outs: int
    ins: int
    out: int
    channels: int
    first_whole: bool
    second_whole: bool
    effective: bool


def _shape(c: LoKrConfig, layer: LayerFacts) -> _Shape:
    ins, channels = factorization(layer.in_features // layer.groups, c.decompose_factor)
    outs, out = factorization(layer.out_features, c.decompose_factor)
    first = not (c.decompose_both and c.r < max(outs, ins) / 2)
    second = c.r >= max(out, channels) / 2
    effective = c.use_effective_conv2d and math.prod(layer.kernel) > 1 and not second
    return _Shape(outs, ins, out, channels, first, second, effective)


class _Kronecker(MapTuner[LoKrConfig]):
    """Storage, and merging."""

    additive = True

    def slots(self, c: LoKrConfig, layer: LayerFacts) -> Iterable[Slot]:
        shape = _shape(c, layer)
        if shape.first_whole:
            yield parameter_slot("lokr_w1", (shape.outs, shape.ins))
        else:
            yield parameter_slot("lokr_w1_a", (shape.outs, c.r))
            yield parameter_slot("lokr_w1_b", (c.r, shape.ins))
        if shape.second_whole:
            yield parameter_slot("lokr_w2", (shape.out, shape.channels, *layer.kernel))
        elif shape.effective:
            kernel = layer.kernel if len(layer.kernel) > 1 else (*layer.kernel, 1)
            yield parameter_slot("lokr_w2_a", (c.r, shape.out))
            yield parameter_slot("lokr_w2_b", (c.r, shape.channels))
            yield parameter_slot("lokr_t2", (c.r, c.r, *kernel))
        else:
            yield parameter_slot("lokr_w2_a", (shape.out, c.r))
            yield parameter_slot("lokr_w2_b", (c.r, shape.channels * math.prod(layer.kernel)))

    def init(self, c: LoKrConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        zeros = {True: {"lokr_w1", "lokr_w1_a"}, "lycoris": {"lokr_w2", "lokr_w2_b"}, False: set()}[c.init_weights]
        for name, tensor in slots.items():
            if name in zeros:
                init.zeros(tensor)
            else:
                init.kaiming_uniform(tensor, math.sqrt(5))

    def scaling(self, c: LoKrConfig, layer: LayerFacts) -> float:
        return c.alpha / c.r

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        import torch

        first, second = _first(a) * a.scaling, _second(a)
        crossed = a.layer.kind is Kind.CONV1D and second.dim() == 3
        delta = torch.kron(first, second if crossed else second.flatten(1)).view_as(p["weight"])
        kept = _kept(a, delta)
        return {**p, "weight": p["weight"] + (delta if kept is None else delta * kept.unsqueeze(1))}


class Folded(_Kronecker):
    """For convolutions: the weight changes, and the layer runs once."""

    supports = CONV_KINDS


class Products(_Kronecker):
    """For linear layers: `ΔW x` with x as a matrix `(ins, in)`, multiplied from both sides."""

    supports = LINEAR_KINDS | EXPERT_KINDS

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        shape = _shape(a.config, a.layer)  # type: ignore[arg-type]  # this plugin's config
        lead = x.shape[:-1]
        rows = x.reshape(-1, shape.channels)
        inner = rows @ (a.lokr_w2 if shape.second_whole else a.lokr_w2_b).t()
        width = inner.shape[-1]
        mixed = inner.view(-1, shape.ins, width).transpose(1, 2).reshape(-1, shape.ins) @ (_first(a) * a.scaling).t()
        out = mixed.view(-1, width, shape.outs).transpose(1, 2)
        if not shape.second_whole:
            out = out.reshape(-1, width) @ a.lokr_w2_a.t()
        out = out.reshape(*lead, shape.outs * shape.out)
        kept = _kept(a, out)
        return out if kept is None else out * kept


class Lookup(_Kronecker):
    """For embeddings: a column of `C ⊗ D` is the product of a column of each."""

    supports = frozenset({Kind.EMBEDDING})

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        from torch.nn.functional import embedding

        shape = _shape(a.config, a.layer)  # type: ignore[arg-type]  # this plugin's config
        first = embedding(x // shape.channels, (_first(a) * a.scaling).t())
        second = embedding(x % shape.channels, (a.lokr_w2 if shape.second_whole else a.lokr_w2_b).t())
        if not shape.second_whole:
            second = second @ a.lokr_w2_a.t()
        out = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
        kept = _kept(a, out)
        return out if kept is None else out * kept


def _first(a: View) -> Tensor:
    """C, `(outs, ins)`."""
    whole = _shape(a.config, a.layer).first_whole  # type: ignore[arg-type]  # this plugin's config
    return a.lokr_w1 if whole else a.lokr_w1_a @ a.lokr_w1_b


def _second(a: View) -> Tensor:
    """D, `(out, in · kernel)`, or `(out, in, *kernel)` where it is stored whole."""
    import torch

    shape = _shape(a.config, a.layer)  # type: ignore[arg-type]  # this plugin's config
    if shape.second_whole:
        return a.lokr_w2
    if shape.effective:
        return torch.einsum("pqk,po,qi->oik", a.lokr_t2.flatten(2), a.lokr_w2_a, a.lokr_w2_b).flatten(1)
    return a.lokr_w2_a @ a.lokr_w2_b


def _kept(a: View, like: Tensor) -> Tensor | None:
    """Factors of the output features of the update, where some are dropped."""
    c = a.config
    assert isinstance(c, LoKrConfig)
    if not a.training:
        return None
    return kept_outputs(a.layer.out_features, c.rank_dropout, c.module_dropout, c.rank_dropout_scale, like)


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "LOKR",
        LoKrConfig,
        (Products(), Folded(), Lookup()),
        prefix="lokr_",
        layer_names=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        layer_options={name: name for name in ("r", "alpha", "rank_dropout", "rank_dropout_scale", "module_dropout")},
        model_class="LoKrModel",
        layer_class="LoKrLayer",
        exports={"factorization": factorization},
        default_targets={"target_modules": "lokr"},
        summary="A Kronecker product of two small matrices beside each frozen weight.",
        paper="arXiv:2309.14859",
        tags=("lokr",),
        examples=(
            {"r": 4, "alpha": 16},
            {"r": 1, "decompose_both": True, "use_effective_conv2d": True},
            {"r": 1, "init_weights": "lycoris", "decompose_factor": 2},
        ),
        identity_at_start=lambda c: c.init_weights is not False,
    )
