"""Modules that keep the weights of several experts in tensors of their own."""

from __future__ import annotations

from torch import Tensor, nn

from peftc.runtime.bases.backend import Backend


class ExpertsBackend(Backend):
    """A module that keeps several weights of its own, such as those of experts `(experts, out, in)`, and uses them as it
    likes: adapters act through its parameters only. A weight `(out, in)` counts as that of one expert."""

    is_map = False

    def __init__(self, transposed: bool) -> None:
        self._transposed = transposed

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 2:
            return tensor.unsqueeze(0)
        return tensor.transpose(1, 2) if self._transposed and tensor.dim() == 3 else tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        if self._transposed and like.dim() == 3:
            return tensor.transpose(1, 2).contiguous()
        return tensor.reshape(like.shape)

    def down(self, base: nn.Module, A: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def up(self, base: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError
