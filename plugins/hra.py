"""HRA: a product of Householder reflections rotates the input of each frozen weight (Yuan et al., arXiv:2405.17484, equation 4).

`W' = W H_1 ... H_r` with `H_i = I - 2 u_i u_i^T`. The product is applied in its compact form `I - U T U^T`, so that the
input is changed by two thin products and no `in × in` matrix is ever made (Schreiber and Van Loan, 1989).
"""

from __future__ import annotations

from typing import Literal

from peftc import plugin as p


class HRAConfig(p.ExpertsMixin, p.RankMixin, p.BiasMixin, p.LayersConfig):
    """Options of an HRA adapter, named as in the reference. `r` is the number of reflections, best even."""

    peft_type: p.PeftType | None = p.PeftType("HRA")
    apply_GS: bool = False
    """Make the reflections orthogonal to each other (Gram-Schmidt)."""
    init_weights: bool = True
    """Start with pairs of equal reflections, which cancel; otherwise, and with `apply_GS`, at random."""
    bias: Literal["none", "all", "hra_only"] = "none"

    @property
    def pairs_up(self) -> bool:
        """Whether reflections can cancel at the start: Gram-Schmidt would leave nothing of the second of a pair."""
        return self.r % 2 == 0 and not self.apply_GS


class HraTuner(p.MapTuner[HRAConfig]):
    """`y = W (H_1 ... H_r x) + b`; for a convolution the reflections act on its flattened patches."""

    supports = p.LINEAR_KINDS | p.EXPERT_KINDS | {p.Kind.CONV2D}
    input_space = "patches"
    rank_limit = p.RankLimit(most=lambda layer: layer.fan_in)

    def slots(self, c: HRAConfig, layer: p.LayerFacts) -> p.Slots:
        yield p.parameter_slot("hra_u", (layer.fan_in, c.r))

    def init(self, c: HRAConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        u = slots["hra_u"]
        if not (c.init_weights and c.pairs_up):
            init.kaiming_uniform(u)
            return
        half = u.new_empty(u.shape[0], c.r // 2)
        init.kaiming_uniform(half)
        u.copy_(half.repeat_interleave(2, dim=1))

    def input(self, a: p.View[HRAConfig], x: p.Tensor) -> p.Tensor:
        u = p.widened(a.hra_u)
        reflect = _orthogonal_reflections if a.config.apply_GS else _reflections
        return reflect(u, x.to(u.dtype)).to(x.dtype)


def _reflections(u: p.Tensor, x: p.Tensor) -> p.Tensor:
    """`H_1 ... H_r x` for rows x `(..., in)` and columns of u `(in, r)`."""
    import torch

    unit = u / u.norm(dim=0)
    # H_1 ... H_r = I - U T U^T where T^-1 = strictly upper part of U^T U, plus I / 2
    inverse = torch.triu(unit.T @ unit, diagonal=1) + 0.5 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    mixed = torch.linalg.solve_triangular(inverse, unit.T, upper=True)  # T U^T, (r, in)
    rotated: p.Tensor = x - (x @ mixed.T) @ unit.T
    return rotated


def _orthogonal_reflections(u: p.Tensor, x: p.Tensor) -> p.Tensor:
    """The same after the columns of u were made orthogonal to each other: reflections that commute."""
    q = _gram_schmidt(u)
    return x - 2 * (x @ q) @ q.T


def _gram_schmidt(u: p.Tensor) -> p.Tensor:
    """Orthonormal columns, each in the direction that the earlier ones leave of it; `(in, r)`."""
    import torch

    columns: list[p.Tensor] = []
    for column in u.unbind(dim=1):
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def check(c: HRAConfig) -> p.Problems:
    """Starts at which the reflections do not cancel."""
    if c.init_weights and not c.pairs_up:
        reason = "Gram-Schmidt separates the pairs" if c.apply_GS else f"{c.r} is odd"
        fix = "Use an even `r` without `apply_GS`." if c.apply_GS else f"Set `r` to {c.r + 1}."
        yield p.rules.NOT_IDENTITY(f"Reflections cannot start as pairs that cancel: {reason}", fix=fix, where="r")


peftc_tuner = p.method(
    HRAConfig,
    HraTuner(),
    prefix="hra_",
    layer_names=("hra_u",),
    layer_options={"hra_r": "r", "hra_apply_GS": "apply_GS"},
    examples=({"r": 4}, {"r": 3}, {"r": 4, "apply_GS": True}),
    check=check,
    identity_at_start=lambda c: c.init_weights and c.pairs_up,
)
