"""A linear map, transposed, where only the map itself is known as a function: the matrix is never formed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from peftc.ops.lowrank import is_traced


def transposed(change: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`rows M`, for rows `(n, features)` and `change(x) = x M^T`. Differentiable in the rows and in what `change` reads.

    Activation checkpointing hides what is saved until backward, and this needs it at once: it is kept plainly, detached, as a
    node that held its own output would never be freed. Autograd attaches the history again.
    """
    if is_traced() or torch.is_inference_mode_enabled():
        (product,) = torch.func.vjp(change, torch.zeros_like(rows))[1](rows)
        return product
    again = torch.is_grad_enabled()
    with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, _as_it_is):
        x = torch.zeros_like(rows).requires_grad_()
        (product,) = torch.autograd.grad(change(x), x, rows, create_graph=again)
    return product


def hides_saved() -> bool:
    """Whether tensors that are saved for backward are packed now, as activation checkpointing does: `torch.func` refuses to
    take derivatives then."""
    if torch.compiler.is_compiling():
        return False
    try:
        with disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
