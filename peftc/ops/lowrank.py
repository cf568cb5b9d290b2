"""The low-rank update, added into the base layer's output in place, with its own backward.

Taking the base *output* keeps every hook and storage of the base layer out of sight, so one function serves all bases.
Thin products are computed small dimension first: `A x^T` is `(r, tokens)`. On a CPU the other order of the same product
takes up to 20 times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from peftc.ops.inputs import save_with_input, saved_with_input


def add_low_rank(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, noise: Noise | None = None
) -> Tensor:
    """`y += scale · (x ∘ noise) A^T B^T`, in place; returns `y`, or a new tensor if traced or if `scale` is a tensor.

    Shapes: y `(..., out)`, freshly made and owned by the caller; x `(..., in)`, as is the noise, if there is any; A `(r, in)`;
    B `(out, r)`. Computed in the dtype of A and rounded once into that of y. Differentiable in all four tensors. Hu et al. 2021,
    equation 3.
    """
    fused = (torch.is_grad_enabled() or is_recorded()) and not isinstance(scale, Tensor) and not is_traced()
    if fused:
        out: Tensor = _AddLowRank.apply(y, x, A, B, scale, noise)
        return out
    if noise is not None:
        x = noise.on(x)
    if isinstance(scale, Tensor) or torch.is_grad_enabled() or is_recorded():
        # a scale that is a tensor: so that what is compiled need not be again when the number changes
        return (y + scale * ((x.to(A.dtype) @ A.t()) @ B.t())).to(y.dtype)
    if x.numel() == x.shape[-1] and x.dtype == A.dtype == y.dtype == B.dtype:
        y.view(-1).addmv_(B, torch.mv(A, x.reshape(-1)), alpha=scale)  # one token: matrix-vector kernels
    else:
        add_update(y, down(x, A), B, scale)
    return y


@dataclass(frozen=True, slots=True)
class Noise:
    """What dropout multiplies an input by: `values` are 0 or `factor`."""

    values: Tensor
    factor: float

    @staticmethod
    def of(x: Tensor, p: float) -> Noise:
        """By the draws of dropout, with this probability of 0."""
        return Noise(F.dropout(torch.ones_like(x), p), 0.0 if p >= 1 else 1 / (1 - p))

    def on(self, x: Tensor) -> Tensor:
        return x * self.values

    @property
    def kept(self) -> Tensor:
        """What backward needs of it, at a byte for each number."""
        return self.values != 0


def left(x: Tensor, kept: Tensor, factor: float) -> Tensor:
    """What a noise leaves of an input, or of a gradient: a new tensor."""
    return (x * kept).mul_(factor)


def is_traced() -> bool:
    """Whether the computation is compiled, recorded, transformed or differentiated forwards, and so must consist of plain
    operations: traced, a function that writes into its input gets wrong gradients, and `torch.func` and `torch.autograd.forward_ad`
    refuse functions with a backward of their own."""
    return (
        torch.compiler.is_compiling()
        or is_recorded()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_recorded() -> bool:
    """Whether `torch.jit.trace` records, which compares what it finds with gradients and without."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def down(x: Tensor, A: Tensor) -> Tensor:
    """`A x^T`, `(r, tokens)`, for x `(..., in)`."""
    return torch.mm(A, x.reshape(-1, x.shape[-1]).to(A.dtype).t())


def add_update(y: Tensor, h: Tensor, B: Tensor, scale: float) -> None:
    """`y += scale · h^T B^T`, in place, for y `(..., out)` and h `(r, tokens)`."""
    rows = y.view(h.shape[1], y.shape[-1])  # told in full: a layer may have no output
    if y.dtype == h.dtype == B.dtype:
        rows.addmm_(h.t(), B.t(), alpha=scale)
    else:
        rows.add_(torch.mm(h.t(), B.t()), alpha=scale)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, noise: Noise | None) -> Tensor:
        h = down(x if noise is None else noise.on(x), A)
        add_update(y, h, B, scale)
        ctx.mark_dirty(y)
        ctx.scale, ctx.factor = scale, None if noise is None else noise.factor
        save_with_input(ctx, x, A, B, h, None if noise is None else noise.kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, kept = saved_with_input(ctx)
        _, need_x, need_A, need_B, _, _ = ctx.needs_input_grad
        rows = grad.reshape(h.shape[1], grad.shape[-1]).to(B.dtype)
        own = x if kept is None else left(x, kept, ctx.factor)
        grad_h, grad_A, grad_B = factor_gradients(rows, own, A, B, h, ctx.scale, need_A, need_B)
        grad_x = torch.mm(grad_h.t(), A).view(x.shape).to(x.dtype) if need_x else None
        if grad_x is not None and kept is not None:
            grad_x = left(grad_x, kept, ctx.factor)
        return grad, grad_x, grad_A, grad_B, None, None


def factor_gradients(
    rows: Tensor, x: Tensor, A: Tensor, B: Tensor, h: Tensor, scale: float, need_A: bool, need_B: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of h `(r, tokens)`, A and B from those of the output, rows `(tokens, out)` in the dtype of B.

    Where these will be differentiated in their turn, h is computed again: the one that was kept has no history.
    """
    if torch.is_grad_enabled():
        h = down(x, A)
    grad_h = torch.mm(B.t(), rows.t()).mul_(scale)
    grad_A = torch.mm(grad_h, x.reshape(-1, x.shape[-1]).to(A.dtype)) if need_A else None
    grad_B = torch.mm(h.to(B.dtype), rows).mul_(scale).t() if need_B else None
    return grad_h, grad_A, grad_B
