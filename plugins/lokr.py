"""LoKr: a Kronecker product of two small matrices beside each frozen weight (arXiv:2309.14859, section 3.3).

`ΔW = s · C ⊗ D`, whose factors may be low-rank themselves. Linear layers apply it as two small products,
`(C ⊗ D) vec(X) = vec(D X C^T)`, so the `out × in` matrix is made only to merge, and for convolutions, whose weight is small
beside what they compute.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from peftc import plugin as p


class LoKrConfig(p.ExpertsMixin, p.AlphaMixin, p.UpdateDropoutMixin, p.LayersConfig):
    """Options of a LoKr adapter, named as in the reference. A factor of at most twice the rank is stored whole."""

    peft_type: p.PeftType | None = p.PeftType("LOKR")
    use_effective_conv2d: bool = False
    """Factor the kernels of convolutions larger than one point as well."""
    decompose_both: bool = False
    """Let the first, smaller factor be low-rank too."""
    decompose_factor: int = p.Field(default=-1, ge=-1)
    """Size of the first factor, or the nearest below it that divides; -1 makes both about equally large."""
    rank_dropout_scale: bool = False
    """Scale what `rank_dropout` leaves so that its mean stays."""
    init_weights: bool | Literal["lycoris"] = True
    """Start the first factor at zero (`lycoris`: the second), which changes nothing; `false` starts both at random."""


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


def _shape(c: LoKrConfig, layer: p.LayerFacts) -> _Shape:
    ins, channels = factorization(layer.in_features // layer.groups, c.decompose_factor)
    outs, out = factorization(layer.out_features, c.decompose_factor)
    first = not (c.decompose_both and c.r < max(outs, ins) / 2)
    second = c.r >= max(out, channels) / 2
    effective = c.use_effective_conv2d and math.prod(layer.kernel) > 1 and not second
    return _Shape(outs, ins, out, channels, first, second, effective)


class _Kronecker(p.MapTuner[LoKrConfig]):
    """Storage, and merging."""

    additive = True

    def slots(self, c: LoKrConfig, layer: p.LayerFacts) -> p.Slots:
        shape = _shape(c, layer)
        if shape.first_whole:
            yield p.parameter_slot("lokr_w1", (shape.outs, shape.ins))
        else:
            yield p.parameter_slot("lokr_w1_a", (shape.outs, c.r))
            yield p.parameter_slot("lokr_w1_b", (c.r, shape.ins))
        if shape.second_whole:
            yield p.parameter_slot("lokr_w2", (shape.out, shape.channels, *layer.kernel))
        elif shape.effective:
            kernel = layer.kernel if len(layer.kernel) > 1 else (*layer.kernel, 1)
            yield p.parameter_slot("lokr_w2_a", (c.r, shape.out))
            yield p.parameter_slot("lokr_w2_b", (c.r, shape.channels))
            yield p.parameter_slot("lokr_t2", (c.r, c.r, *kernel))
        else:
            yield p.parameter_slot("lokr_w2_a", (shape.out, c.r))
            yield p.parameter_slot("lokr_w2_b", (c.r, shape.channels * math.prod(layer.kernel)))

    def init(self, c: LoKrConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        zeros = {True: {"lokr_w1", "lokr_w1_a"}, "lycoris": {"lokr_w2", "lokr_w2_b"}, False: set()}[c.init_weights]
        for name, tensor in slots.items():
            init.zeros(tensor) if name in zeros else init.kaiming_uniform(tensor)

    def scaling(self, c: LoKrConfig, layer: p.LayerFacts) -> float:
        return c.alpha / c.r

    def params(self, a: p.View[LoKrConfig], w: p.Tensors, w0: p.Tensors) -> p.Tensors:
        import torch

        first, second = _first(a), _second(a)
        crossed = a.layer.kind is p.Kind.CONV1D and second.dim() == 3
        delta = torch.kron(first, second if crossed else second.flatten(1)).view_as(w["weight"])
        return {**w, "weight": w["weight"] + p.drop_outputs(a, delta, 0, a.config.rank_dropout_scale)}


class Folded(_Kronecker):
    """For convolutions: the weight changes, and the layer runs once."""

    supports = p.CONV_KINDS


class Products(_Kronecker):
    """For linear layers: `ΔW x` with x as a matrix `(ins, in)`, multiplied from both sides."""

    supports = p.LINEAR_KINDS | p.EXPERT_KINDS

    def branch(self, a: p.View[LoKrConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        shape = _shape(a.config, a.layer)
        inner = x.reshape(-1, shape.channels) @ (a.lokr_w2 if shape.second_whole else a.lokr_w2_b).t()
        width = inner.shape[-1]
        mixed = inner.view(-1, shape.ins, width).transpose(1, 2).reshape(-1, shape.ins) @ _first(a).t()
        out = mixed.view(-1, width, shape.outs).transpose(1, 2)
        if not shape.second_whole:
            out = out.reshape(-1, width) @ a.lokr_w2_a.t()
        return p.drop_outputs(a, out.reshape(*x.shape[:-1], -1), rescale=a.config.rank_dropout_scale)


class Lookup(_Kronecker):
    """For embeddings: a column of `C ⊗ D` is the product of a column of each."""

    supports = frozenset({p.Kind.EMBEDDING})

    def branch(self, a: p.View[LoKrConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        shape = _shape(a.config, a.layer)
        first = p.columns(_first(a), x // shape.channels)
        second = p.columns(a.lokr_w2 if shape.second_whole else a.lokr_w2_b, x % shape.channels)
        if not shape.second_whole:
            second = second @ a.lokr_w2_a.t()
        out = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
        return p.drop_outputs(a, out, rescale=a.config.rank_dropout_scale)


def _first(a: p.View[LoKrConfig]) -> p.Tensor:
    """`s · C`, `(outs, ins)`."""
    return (a.lokr_w1 if _shape(a.config, a.layer).first_whole else a.lokr_w1_a @ a.lokr_w1_b) * a.scaling


def _second(a: p.View[LoKrConfig]) -> p.Tensor:
    """D, `(out, in · kernel)`, or `(out, in, *kernel)` where it is stored whole."""
    import torch

    shape = _shape(a.config, a.layer)
    if shape.second_whole:
        return a.lokr_w2
    if shape.effective:
        return torch.einsum("pqk,po,qi->oik", a.lokr_t2.flatten(2), a.lokr_w2_a, a.lokr_w2_b).flatten(1)
    return a.lokr_w2_a @ a.lokr_w2_b


peftc_tuner = p.method(
    LoKrConfig,
    (Products(), Folded(), Lookup()),
    prefix="lokr_",
    layer_names=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    layer_options=("r", "alpha", "rank_dropout", "rank_dropout_scale", "module_dropout"),
    exports=(factorization,),
    tags=("lokr",),
    examples=(
        {"r": 4, "alpha": 16},
        {"r": 1, "decompose_both": True, "use_effective_conv2d": True},
        {"r": 1, "init_weights": "lycoris", "decompose_factor": 2},
    ),
    identity_at_start=lambda c: c.init_weights is not False,
)
