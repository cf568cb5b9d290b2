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

from peftc.ops.lowrank import add_update, down, factor_gradients, is_traced


def is_bare(base: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether reading the weight equals calling the layer: frozen plain parameters of one dtype, no hook, no patch."""
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and x.dtype == weight.dtype == dtype
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and "forward" not in base.__dict__
        and not _has_any_global_hook()
        and not torch.is_autocast_enabled(x.device.type)
        and not is_traced()
    )


def linear_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`x W^T + b + scale · x A^T B^T`. Shapes: x `(..., in)`, weight `(out, in)`, A `(r, in)`, B `(out, r)`.

    Differentiable in x, A and B. Hu et al. 2021, equation 3.
    """
    y: Tensor = _LinearLowRank.apply(x, weight, bias, A, B, scale)
    return y


class _LinearLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        y = F.linear(x, weight, bias)
        h = down(x, A)
        add_update(y, h, B, scale)
        ctx.save_for_backward(x, weight, A, B, h)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x, weight, A, B, h = ctx.saved_tensors
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        rows = grad.reshape(h.shape[1], grad.shape[-1])
        grad_h, grad_A, grad_B = factor_gradients(rows, x, A, B, h, ctx.scale, need_A, need_B)
        grad_x = torch.mm(rows, weight).addmm_(grad_h.t(), A).view(x.shape) if need_x else None
        return grad_x, None, None, grad_A, grad_B, None
