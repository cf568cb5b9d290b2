"""LoHa: the entrywise product of two low-rank updates beside each frozen weight (arXiv:2108.06098, section 2.2).

`ΔW = s · (A1 B1) ∘ (A2 B2)` has thin factors of rank r², rows of A1 and A2 multiplied pairwise and columns of B1 and B2
too, so that no `out × in` matrix is made where r² is small. Kernels of convolutions can be factored further (proposition 3).
"""

from __future__ import annotations

import math

from peftc import plugin as p


class LoHaConfig(p.ExpertsMixin, p.AlphaMixin, p.UpdateDropoutMixin, p.InitWeightsMixin, p.LayersConfig):
    """Options of a LoHa adapter, named as in the reference. The update can have any rank up to `r` squared."""

    peft_type: p.PeftType | None = p.PeftType("LOHA")
    use_effective_conv2d: bool = False
    """Factor the kernels of convolutions larger than one point as well."""
    init_weights: bool = True
    """Start one factor at zero, which changes nothing; otherwise all at random."""

    def factors_kernel(self, layer: p.LayerFacts) -> bool:
        """Whether a layer's kernel has factors of its own."""
        return self.use_effective_conv2d and math.prod(layer.kernel) > 1


class _Product(p.MapTuner[LoHaConfig]):
    """Storage, and merging."""

    additive = True
    rank_limit = p.RankLimit()

    def slots(self, c: LoHaConfig, layer: p.LayerFacts) -> p.Slots:
        out, channels = layer.out_features, layer.in_features // layer.groups
        for factor in ("hada_w1", "hada_w2"):
            if c.factors_kernel(layer):
                kernel = layer.kernel if len(layer.kernel) > 1 else (*layer.kernel, 1)
                yield p.parameter_slot(factor.replace("w", "t"), (c.r, c.r, *kernel))
                yield p.parameter_slot(f"{factor}_a", (c.r, out))
                yield p.parameter_slot(f"{factor}_b", (c.r, channels))
            else:
                yield p.parameter_slot(f"{factor}_a", (out, c.r))
                yield p.parameter_slot(f"{factor}_b", (c.r, layer.fan_in))

    def init(self, c: LoHaConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        for name in sorted(slots, key=lambda name: ("t" in name, name)):
            is_zero = name == "hada_w2_b" and c.init_weights
            init.zeros(slots[name]) if is_zero else init.kaiming_uniform(slots[name])

    def scaling(self, c: LoHaConfig, layer: p.LayerFacts) -> float:
        return c.alpha / c.r

    def params(self, a: p.View[LoHaConfig], w: p.Tensors, w0: p.Tensors) -> p.Tensors:
        a1, b1, a2, b2 = _factors(a)
        return {**w, "weight": w["weight"].addcmul((a1 * a.scaling) @ b1, a2 @ b2)}


class Folded(_Product):
    """For ranks whose square is not small, and grouped convolutions: the weight changes, and the layer runs once."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | p.EXPERT_KINDS


class Thin(Folded):
    """Two thin products of rank r²."""

    def thin(self, a: p.View[LoHaConfig]) -> p.Factors:
        a1, b1, a2, b2 = _factors(a)
        A = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
        B = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
        return A, B, a.scaling


class Lookup(_Product):
    """For embeddings: columns of both products for the ids at hand."""

    supports = frozenset({p.Kind.EMBEDDING})

    def branch(self, a: p.View[LoHaConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        a1, b1, a2, b2 = _factors(a)
        return (p.columns(b1, x) @ (a1 * a.scaling).t()) * (p.columns(b2, x) @ a2.t())


def _factors(a: p.View[LoHaConfig]) -> tuple[p.Tensor, p.Tensor, p.Tensor, p.Tensor]:
    """A1 `(out, r)`, without the rows that are dropped, B1 `(r, in · kernel)`, A2, B2."""
    a1, b1, a2, b2 = a.hada_w1_a, a.hada_w1_b, a.hada_w2_a, a.hada_w2_b
    if a.config.factors_kernel(a.layer):
        a1, b1, a2, b2 = a1.t(), _kernels(a.hada_t1, b1), a2.t(), _kernels(a.hada_t2, b2)
    return p.drop_outputs(a, a1, dim=0), b1, a2, b2


def _kernels(core: p.Tensor, channels: p.Tensor) -> p.Tensor:
    """`(r, in · kernel)` from the core `(r, r, *kernel)` and the channels' factor `(r, in)`."""
    import torch

    return torch.einsum("pqk,qi->pik", core.flatten(2), channels).flatten(1)


FOLDED, THIN, LOOKUP = Folded(), Thin(), Lookup()


def tuner_for(c: LoHaConfig, node: p.ModuleNode) -> p.MapTuner[LoHaConfig]:
    """Thin products where they are cheaper than the gradient of a whole weight, forward and backward counted."""
    layer = node.facts
    if layer.kind is p.Kind.EMBEDDING:
        return LOOKUP
    ins, outs = layer.fan_in, layer.out_features
    return THIN if layer.groups == 1 and 3 * c.r**2 * (ins + outs) < ins * outs else FOLDED


peftc_tuner = p.method(
    LoHaConfig,
    tuner_for,
    choices=(THIN, FOLDED, LOOKUP),
    prefix="hada_",
    layer_names=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    layer_options=("r", "alpha", "rank_dropout", "module_dropout"),
    tags=("loha",),
    examples=({"r": 1}, {"r": 4, "alpha": 16}, {"r": 2, "use_effective_conv2d": True}),
)
