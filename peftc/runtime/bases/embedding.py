"""Embeddings: maps from one-hot vectors, whose input is ids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.host.layers import embedding_scale
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.places import tensor_of


class EmbeddingBackend(Backend):
    """`nn.Embedding`: the weight `(num, dim)` is the transposed map from one-hot vectors."""

    input_axis = None
    vector_axis = 1

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if name == "weight" else tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.t().contiguous() if name == "weight" else tensor

    def down(self, base: nn.Module, A: Tensor, x: Tensor) -> Tensor:
        assert isinstance(base, nn.Embedding)
        return F.embedding(x, A.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def up(self, base: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        return self.scaled(base, F.linear(h, B))

    def scaled(self, base: nn.Module, delta: Tensor) -> Tensor:
        scale = embedding_scale(base)
        return delta if scale is None else delta * scale

    def exchanged(self, base: nn.Module, index: Tensor, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        weight = tensor_of(base, "weight")
        assert weight is not None
        ids, order = index.sort()
        place = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        own = self.scaled(base, F.embedding(order[place], values.to(weight.dtype)))
        return torch.where((ids[place] == x).unsqueeze(-1), own.to(y.dtype), y)
