"""Arithmetic that many methods write alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def columns(A: Tensor, ids: Tensor) -> Tensor:
    """Columns of A `(r, num)` for ids `(...)`, as rows `(..., r)`: what an embedding computes."""
    return F.embedding(ids, A.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`W x + b` for rows x `(..., in)`, W `(out, in)`."""
    return F.linear(x, weight, bias)


def indices(given: Sequence[int]) -> Tensor:
    """Whole numbers `(n,)` on the CPU."""
    return torch.tensor(list(given), dtype=torch.int64)
