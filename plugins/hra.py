"""HRA: the weight times a product of Householder reflections (Yuan et al., arXiv:2405.17484, equation 4).

`W' = W H_1 ... H_r` with `H_i = I - 2 u_i u_i^T`. The product is applied in its compact form `I - U T U^T`, so that the
input is changed by two thin products and no `in × in` matrix is ever made (Schreiber and Van Loan, 1989).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from peftc.plugin import (
    EXPERT_KINDS,
    LINEAR_KINDS,
    Diagnostic,
    ExpertsMixin,
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
    View,
    hookimpl,
    parameter_slot,
    rules,
)

if TYPE_CHECKING:
    from torch import Tensor


class HRAConfig(TargetsMixin, ExpertsMixin, LayersMixin, RankMixin, ModulesToSaveMixin, PeftConfig):
    """Options of an HRA adapter, named as in the reference. `r` is the number of reflections, best even."""

    peft_type: PeftType | None = PeftType("HRA")
    apply_GS: bool = False
    """Make the reflections orthogonal to each other (Gram-Schmidt)."""
    init_weights: bool = True
    """Start with pairs of equal reflections, which cancel; otherwise, and with `apply_GS`, at random."""
    bias: str = "none"
    """Biases of the base model to train along: `none`, `all`, or `hra_only` for those of adapted layers."""


class HraTuner(MapTuner[HRAConfig]):
    """`y = W (H_1 ... H_r x) + b`; for a convolution the reflections act on its flattened patches."""

    supports = LINEAR_KINDS | EXPERT_KINDS | {Kind.CONV2D}
    input_space = "patches"

    def slots(self, c: HRAConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("hra_u", (_inputs(layer), c.r))

    def init(self, c: HRAConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        u = slots["hra_u"]
        if not c.init_weights or c.r % 2 or c.apply_GS:  # Gram-Schmidt would leave nothing of the second of a pair
            init.kaiming_uniform(u, math.sqrt(5))
            return
        half = u.new_empty(u.shape[0], c.r // 2)
        init.kaiming_uniform(half, math.sqrt(5))
        u.copy_(half.repeat_interleave(2, dim=1))

    def check(self, c: HRAConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        size = _inputs(layer)
        if c.r > size:
            yield rules.RANK_BEYOND_LAYER(
                f"{c.r} reflections are more than the {size} inputs of `{path}`",
                fix=f"Set `r` to at most {size}.",
                where=path,
            )

    def input(self, a: View, x: Tensor) -> Tensor:
        u = a.hra_u
        if u.dtype.itemsize < 4:  # there is no triangular solver in half precision, and reflections need more
            u = u.float()
        reflect = _orthogonal_reflections if a.config.apply_GS else _reflections  # type: ignore[attr-defined]  # this plugin's config
        return reflect(u, x.to(u.dtype)).to(x.dtype)


def _inputs(layer: LayerFacts) -> int:
    """Numbers that an output of the layer is computed from."""
    return layer.in_features // layer.groups * math.prod(layer.kernel)


def _reflections(u: Tensor, x: Tensor) -> Tensor:
    """`H_1 ... H_r x` for rows x `(..., in)` and columns of u `(in, r)`."""
    import torch

    unit = u / u.norm(dim=0)
    # H_1 ... H_r = I - U T U^T where T^-1 = strictly upper part of U^T U, plus I / 2
    inverse = torch.triu(unit.T @ unit, diagonal=1) + 0.5 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    mixed = torch.linalg.solve_triangular(inverse, unit.T, upper=True)  # T U^T, (r, in)
    rotated: Tensor = x - (x @ mixed.T) @ unit.T
    return rotated


def _orthogonal_reflections(u: Tensor, x: Tensor) -> Tensor:
    """The same after the columns of u were made orthogonal to each other: reflections that commute."""
    q = _gram_schmidt(u)
    return x - 2 * (x @ q) @ q.T


def _gram_schmidt(u: Tensor) -> Tensor:
    """Orthonormal columns, each in the direction that the earlier ones leave of it; `(in, r)`."""
    import torch

    columns: list[Tensor] = []
    for column in u.unbind(dim=1):
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def check(c: HRAConfig) -> Iterable[Diagnostic]:
    """Values without a meaning, and starts at which the reflections do not cancel."""
    if c.bias not in ("none", "all", "hra_only"):
        yield rules.BAD_VALUE(f"`bias` cannot be `{c.bias}`", fix="Use `none`, `all` or `hra_only`.", where="bias")
    if c.init_weights and (c.r % 2 or c.apply_GS):
        reason = "Gram-Schmidt separates the pairs" if c.apply_GS else f"{c.r} is odd"
        yield rules.NOT_IDENTITY(
            f"Reflections cannot start as pairs that cancel: {reason}",
            fix="Use an even `r` without `apply_GS`." if c.apply_GS else f"Set `r` to {c.r + 1}.",
            where="r",
        )


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "HRA",
        HRAConfig,
        HraTuner(),
        prefix="hra_",
        layer_names=("hra_u",),
        layer_options={"hra_r": "r", "hra_apply_GS": "apply_GS"},
        model_class="HRAModel",
        layer_class="HRALayer",
        default_targets={"target_modules": "hra"},
        summary="A product of Householder reflections rotates the input of each frozen weight.",
        paper="arXiv:2405.17484",
        examples=({"r": 4}, {"r": 3}, {"r": 4, "apply_GS": True}),
        check=check,
        identity_at_start=lambda c: c.init_weights and c.r % 2 == 0 and not c.apply_GS,
    )
