"""Linear layers: weights stored as `(out, in)`, or as `(in, out)`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from peftc.ops.linear import is_bare
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.places import tensor_of


class LinearBackend(Backend):
    """`nn.Linear`: stored as it is."""

    is_plain_linear = True
    vector_axis: int | None = 0

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor

    def down(self, base: nn.Module, A: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, A)

    def up(self, base: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        return F.linear(h, B)

    def can_refold(self, base: nn.Module, x: Tensor) -> bool:
        return self.is_plain_linear and is_bare(base, x)

    def exchanged(self, base: nn.Module, index: Tensor, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        bias, weight = tensor_of(base, "bias"), tensor_of(base, "weight")
        assert weight is not None
        own = F.linear(x, values.to(weight.dtype), None if bias is None else bias[index])
        return y.index_copy_(-1, index, own.to(y.dtype))


class TransposedLinearBackend(LinearBackend):
    """transformers' `Conv1D`: a linear map whose weight is `(in, out)`."""

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if name == "weight" else tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.t().contiguous() if name == "weight" else tensor
