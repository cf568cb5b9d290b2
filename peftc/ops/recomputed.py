"""A function whose backward computes it again from its inputs, instead of keeping what it made on the way.

For functions that cost little beside the tensors they would keep: of the input nothing new is kept, so layers that share
an input share it between forward and backward. Random numbers that the function drew are drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftc.ops.generators import Generators
from peftc.ops.lowrank import is_traced


def can_recompute(x: Tensor) -> bool:
    """Whether there will be a backward that finds things as forward did: nothing traces, or casts by itself."""
    return torch.is_grad_enabled() and not is_traced() and not torch.is_autocast_enabled(x.device.type)


def recomputed(function: Callable[..., Tensor], x: Tensor, slots: Sequence[Tensor]) -> Tensor:
    """`function(x, *slots)`, differentiable once, in x and the slots."""
    y: Tensor = _Recomputed.apply(function, x, *slots)
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.drawn = Generators(inputs[0].device)
        y = function(*inputs)
        ctx.drawn.forget_unless_used()
        ctx.save_for_backward(*inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[1:]
        with torch.enable_grad(), ctx.drawn.again():
            own = [
                tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(ctx.saved_tensors, need, strict=True)
            ]
            y = ctx.function(*own)
        wanted = [tensor for tensor in own if tensor.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, *(next(found) if asked else None for asked in need)
