"""How whole parameters lie in memory and in checkpoints, and how lowerings see them: for methods that store such ones.

The one thing that a method with copies of parameters has to know about storage. Only views are made, so no torch is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftc.graph.nodes import Kind, LayerFacts

if TYPE_CHECKING:
    from torch import Tensor

_TRANSPOSED = frozenset({Kind.EMBEDDING, Kind.CONV1D_TRANSPOSED})


def to_logical(layer: LayerFacts, name: str, tensor: Tensor) -> Tensor:
    """A stored parameter in logical order: a weight as `(out, in · kernel)`, an embedding's as `(dim, num)`."""
    if name != "weight":
        return tensor
    if layer.kind in _TRANSPOSED:
        return tensor.t()
    return tensor.flatten(1) if layer.kernel else tensor


def to_stored(layer: LayerFacts, name: str, tensor: Tensor) -> Tensor:
    """The inverse of `to_logical`."""
    if name != "weight":
        return tensor
    if layer.kind in _TRANSPOSED:
        return tensor.t()
    return tensor.reshape(tensor.shape[0], -1, *layer.kernel) if layer.kernel else tensor
