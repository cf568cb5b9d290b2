"""Low-rank updates of a batch whose rows belong to different adapters: two batched products, however many adapters.

Factors are stacked for the call, since parameters are never views of a bank. Smaller ranks are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

#: `(A, B, s)` of one adapter: A `(r, in)`, B `(out, r)`
Thin = tuple[Tensor, Tensor, float]


def grouped_low_rank(x: Tensor, thins: Sequence[Thin], counts: Sequence[int]) -> Tensor:
    """`s_g B_g A_g x` for rows of x `(rows, ..., in)`, the first `counts[0]` of which are for the first adapter, and so on.

    Returns `(rows, ..., out)` in the dtype of the factors. Differentiable in x and in every factor.
    """
    A, B, scale = _stacked(thins)
    groups = len(thins)
    if len(set(counts)) > 1:  # each row brings its adapter's factors
        owner = torch.tensor([group for group, count in enumerate(counts) for _ in range(count)], device=x.device)
        A, B, groups = A[owner], B[owner], x.shape[0]
    tokens = x.reshape(groups, -1, x.shape[-1]).to(A.dtype)
    h = torch.bmm(A, tokens.transpose(1, 2))  # small dimension first, as everywhere: (groups, r, tokens)
    if scale != 1.0:
        h = h * scale
    y = torch.bmm(h.transpose(1, 2), B.transpose(1, 2))
    return y.reshape(*x.shape[:-1], B.shape[1])


def _stacked(thins: Sequence[Thin]) -> tuple[Tensor, Tensor, float]:
    """`(groups, r, in)`, `(groups, out, r)`, and the scale that all have; different ones are within the first."""
    first, second, scales = [thin[0] for thin in thins], [thin[1] for thin in thins], {thin[2] for thin in thins}
    if len(scales) > 1:
        first = [A * scale for A, _, scale in thins]
    if len({(A.dtype, A.shape[0]) for A in first}) > 1:
        rank, dtype = max(A.shape[0] for A in first), reduce(torch.promote_types, (A.dtype for A in first))
        first = [F.pad(A.to(dtype), (0, 0, 0, rank - A.shape[0])) for A in first]
        second = [F.pad(B.to(dtype), (0, rank - B.shape[1])) for B in second]
    return torch.stack(first), torch.stack(second), scales.pop() if len(scales) == 1 else 1.0
