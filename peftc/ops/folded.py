"""A frozen linear layer with adapters folded into its weight, for training, without keeping what was folded.

Backward folds once more from the slots: that costs little beside the layer's products, and saves a tensor as large as the
weight per layer between forward and backward. Random numbers that folding drew are drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftc.ops.generators import Generators
from peftc.ops.inputs import save_with_input, saved_with_input
from peftc.ops.recomputed import pulled_back

#: slots -> weight `(out, in)` and bias `(out,)`
Fold = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None]]


def linear_folded(x: Tensor, fold: Fold, slots: Sequence[Tensor]) -> Tensor:
    """`x W'^T + b'` with `W', b' = fold(slots)`, for x `(..., in)`. Differentiable in x and the slots."""
    y: Tensor = _LinearFolded.apply(x, fold, *slots)
    return y


class _LinearFolded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fold: Fold, *slots: Tensor) -> Tensor:
        ctx.drawn = Generators(x.device)
        weight, bias = fold(slots)
        ctx.drawn.forget_unless_used()
        ctx.fold = fold
        save_with_input(ctx, x, *slots)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *slots = saved_with_input(ctx)
        need_x, _, *need = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradients will be differentiated: by plain operations, with their history
            with ctx.drawn.again():
                grad_x, *rest = pulled_back(partial(_plain, ctx.fold), (x, *slots), (need_x, *need), grad)
            return grad_x, None, *rest
        with torch.enable_grad(), ctx.drawn.again():
            own = [slot.detach().requires_grad_(wanted) for slot, wanted in zip(slots, need, strict=True)]
            weight, bias = ctx.fold(own)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = torch.mm(rows, weight.detach()).view(x.shape) if need_x else None
        folded, grown = [], []
        if weight.requires_grad:
            folded.append(weight)
            grown.append(torch.mm(rows.t(), x.reshape(-1, x.shape[-1])))
        if bias is not None and bias.requires_grad:
            folded.append(bias)
            grown.append(rows.sum(dim=0))
        trained = [slot for slot in own if slot.requires_grad]
        found = iter(torch.autograd.grad(folded, trained, grown, allow_unused=True) if folded and trained else ())
        return grad_x, None, *(next(found, None) if wanted else None for wanted in need)


def _plain(fold: Fold, x: Tensor, *slots: Tensor) -> Tensor:
    return F.linear(x, *fold(slots))
