"""A layer's input: what its class calls it, and what of it is dropped in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn


@cache
def first_argument(forward: Callable[..., Any]) -> str:
    """What a class of layers calls its input, for calls by keyword."""
    names = iter(inspect.signature(forward).parameters)
    next(names)
    return next(names, "")


class Dropout:
    """Dropout that follows the layer's training mode, without a module whose name would be in the model."""

    __slots__ = ("layer", "p")

    def __init__(self, layer: nn.Module, p: float) -> None:
        self.layer = layer
        self.p = p

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self.layer.training)
