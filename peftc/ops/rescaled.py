"""A frozen `nn.Linear` whose updated weight is rescaled row by row, as one function for training; and norms of such rows.

Of the output one tensor is kept beside those of a plain update, for the gradient of the rows' factors.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftc.ops.inputs import save_with_input, saved_with_input
from peftc.ops.lowrank import add_update, down, factor_gradients
from peftc.ops.recomputed import pulled_back

#: Rows of a weight in half precision that are widened at a time.
_ROWS = 1024


def linear_rescaled(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, gain: Tensor
) -> Tensor:
    """`g ∘ (x W^T + scale · x A^T B^T) + b`. Shapes: x `(..., in)`, weight `(out, in)`, A `(r, in)`, B `(out, r)`, gain `(out,)`.

    Differentiable in x, A, B and gain. Liu et al., arXiv:2402.09353, equation 5, with the norm in the gain.
    """
    y: Tensor = _LinearRescaled.apply(x, weight, bias, A, B, scale, gain)
    return y


class _LinearRescaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, gain: Tensor
    ) -> Tensor:
        z = F.linear(x, weight)
        h = down(x, A)
        add_update(z, h, B, scale)
        save_with_input(ctx, x, weight, bias, A, B, gain, h, z)
        ctx.scale = scale
        return z * gain if bias is None else torch.addcmul(bias, z, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, gain, h, z = saved_with_input(ctx)
        need_x, _, _, need_A, need_B, _, need_gain = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradients will be differentiated: by plain operations, with their history
            plain = partial(_plain, weight, bias, ctx.scale)
            found = pulled_back(plain, (x, A, B, gain), (need_x, need_A, need_B, need_gain), grad)
            return found[0], None, None, found[1], found[2], None, found[3]
        rows = grad.reshape(h.shape[1], grad.shape[-1])
        grad_gain = (rows * z.view_as(rows)).sum(0) if need_gain else None
        rows = rows * gain
        grad_h, grad_A, grad_B = factor_gradients(rows, x, A, B, h, ctx.scale, need_A, need_B)
        grad_x = torch.mm(rows, weight).addmm_(grad_h.t(), A).view(x.shape) if need_x else None
        return grad_x, None, None, grad_A, grad_B, None, grad_gain


def _plain(weight: Tensor, bias: Tensor | None, scale: float, x: Tensor, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
    y = (F.linear(x, weight) + scale * F.linear(F.linear(x, A), B)) * gain
    return y if bias is None else y + bias


def row_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms of the rows of a matrix `(out, ...)`, in a dtype, without a copy of all of it."""
    if weight.dtype == dtype:
        return torch.linalg.norm(weight, dim=1)
    return torch.cat([torch.linalg.norm(part.to(dtype), dim=1) for part in weight.split(_ROWS)])


def norms_of_sum(weight: Tensor, norms: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Norms of the rows of `W + s · B A`, from those of W `(out,)`, without making a matrix of its size.

    `‖w + s A^T b‖² = ‖w‖² + 2 s b · (A w) + s² b · (A A^T) b` for each row w of W and b of B.
    """
    parts = [part.to(A.dtype) @ A.t() for part in weight.split(_ROWS)] if weight.dtype != A.dtype else [weight @ A.t()]
    cross = (2 * scale) * (parts[0] if len(parts) == 1 else torch.cat(parts)) + (scale * scale) * (B @ (A @ A.t()))
    return (norms * norms + (cross * B).sum(1)).clamp_min(0).sqrt()
