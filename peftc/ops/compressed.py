"""A product with a thin factor that keeps of its input, for backward, one number for each group of features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def parts(x: Tensor, count: int) -> Tensor:
    """Inputs `(..., in)` as rows of `count` groups of equally many features, `(tokens, count, size)`, padded with zeros."""
    size = -(-x.shape[-1] // count)
    rows = F.pad(x, (0, count * size - x.shape[-1]))
    return rows.reshape(-1, count, size)


def mean_direction(x: Tensor, count: int) -> Tensor:
    """The mean of all groups of all inputs, of length one, `(size,)` in float32; all alike where it is zero."""
    mean = parts(x, count).flatten(0, 1).mean(0).float()
    length = torch.linalg.vector_norm(mean)
    return torch.where(length > 0, mean / length, torch.full_like(mean, mean.numel() ** -0.5))


def linear_compressed(x: Tensor, A: Tensor, direction: Tensor, count: int, scale: float) -> Tensor:
    """`x A^T`, x `(..., in)`, A `(r, in)`. The gradient of A is that of inputs of which only the part along `direction`
    `(ceil(in / count),)` is left in each group, times `scale`; that of x is exact. Miles et al., arXiv:2405.17991, equation 3.
    """
    y: Tensor = _Compressed.apply(x, A, direction, count, scale)
    return y


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, direction: Tensor, count: int, scale: float) -> Tensor:
        kept = torch.einsum("tgd,d->tg", parts(x, count), direction.to(x.dtype))
        ctx.save_for_backward(kept, A, direction)
        ctx.scale, ctx.shape = scale, x.shape
        return F.linear(x, A)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        kept, A, direction = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = (rows @ A.to(rows.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_A = None
        if ctx.needs_input_grad[1]:  # the inputs' parts are multiples of one direction: no row of them is made again
            along = rows.t() @ kept.to(rows.dtype)
            whole = (along.unsqueeze(-1) * direction.to(along.dtype)).flatten(1)
            grad_A = (whole[:, : A.shape[1]] * ctx.scale).to(A.dtype)
        return grad_x, grad_A, None, None, None
