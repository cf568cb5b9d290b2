"""A frozen `nn.Linear` and its low-rank update as one function, for training.

Its backward adds the update's part of `dx` to the base's in place, which spares a tensor as large as the input per layer.
It reads the base weight itself, so it serves only where nothing hangs at the base layer: `is_bare` says when.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peftc.host.torch_modules import all_hooks
from peftc.ops.inputs import save_with_input, saved_with_input
from peftc.ops.lowrank import Noise, add_update, down, factor_gradients, is_traced, left


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody would see a call of the module, or has put another function in its place."""
    return not (any(all_hooks(module)) or "forward" in module.__dict__ or _has_any_global_hook())


def is_bare(base: nn.Module, x: Tensor) -> bool:
    """Whether reading the weight equals calling the layer: frozen plain parameters of one dtype, no hook, no patch."""
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and x.dtype == weight.dtype
        and is_unwatched(base)
        and not torch.is_autocast_enabled(x.device.type)
        and not is_traced()
    )


def linear_low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, noise: Noise | None = None
) -> Tensor:
    """`x W^T + b + scale · (x ∘ noise) A^T B^T`. Shapes: x and noise `(..., in)`, weight `(out, in)`, A `(r, in)`, B `(out, r)`.

    Differentiable in x, A and B. Hu et al. 2021, equation 3.
    """
    y: Tensor = _LinearLowRank.apply(x, weight, bias, A, B, scale, noise)
    return y


def linear_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, for a function to return: with a bias torch gives a view, into which nobody may write who got it of one."""
    y = F.linear(x, weight, bias)
    own: Tensor = torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
    return own


class _LinearLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        noise: Noise | None,
    ) -> Tensor:
        y = linear_output(x, weight, bias)
        h = down(x if noise is None else noise.on(x), A)
        add_update(y, h, B, scale)
        ctx.scale, ctx.factor = scale, None if noise is None else noise.factor
        save_with_input(ctx, x, weight, A, B, h, None if noise is None else noise.kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, h, kept = saved_with_input(ctx)
        need_x, _, _, need_A, need_B, _, _ = ctx.needs_input_grad
        rows = grad.reshape(h.shape[1], grad.shape[-1])
        own = x if kept is None else left(x, kept, ctx.factor)
        grad_h, grad_A, grad_B = factor_gradients(rows, own, A, B, h, ctx.scale, need_A, need_B)
        if not need_x:
            return None, None, None, grad_A, grad_B, None, None
        grad_x = torch.mm(rows, weight)
        if kept is None:
            grad_x.addmm_(grad_h.t(), A)
        else:
            grad_x.add_(left(torch.mm(grad_h.t(), A), kept.view(grad_x.shape), ctx.factor))
        return grad_x.view(x.shape), None, None, grad_A, grad_B, None, None
