"""A function whose backward computes it again from its inputs, instead of keeping what it made on the way.

For functions that cost little beside the tensors they would keep: of the input nothing new is kept, so layers that share
an input share it between forward and backward. Random numbers that the function drew are drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftc.ops.generators import Generators
from peftc.ops.inputs import save_with_input, saved_with_input
from peftc.ops.lowrank import is_traced


def can_recompute(x: Tensor) -> bool:
    """Whether there will be a backward that finds things as forward did: nothing traces, or casts by itself."""
    return torch.is_grad_enabled() and not is_traced() and not torch.is_autocast_enabled(x.device.type)


def recomputed(function: Callable[..., Tensor], x: Tensor, slots: Sequence[Tensor]) -> Tensor:
    """`function(x, *slots)`, differentiable in x and the slots."""
    y: Tensor = _Recomputed.apply(function, x, *slots)
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.drawn = Generators(inputs[0].device)
        y = function(*inputs)
        ctx.drawn.forget_unless_used()
        save_with_input(ctx, *inputs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.drawn.again():
            return None, *pulled_back(ctx.function, saved_with_input(ctx), ctx.needs_input_grad[1:], grad)


def pulled_back(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of those inputs of a function that need one, from that of its output, by computing it again.

    Within a backward: where its gradients are to be differentiated in their turn, they keep the history of the inputs.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t.view_as(t) if again else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
        y = function(*own)
        wanted = [tensor for tensor, need in zip(own, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]
