"""Arithmetic of combining adapters: tensors of several tasks, weighted, pruned, and reconciled where their signs differ.

Task arithmetic (Ilharco et al., arXiv:2212.04089), TIES (Yadav et al., arXiv:2306.01708), DARE (Yu et al.,
arXiv:2311.03099), and the closest thin factors of a sum (Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pruning:
    """`density` is the share of entries kept; `majority` how signs are elected: by `"total"` mass or by `"frequency"`."""

    density: float = 1.0
    majority: str = "total"


#: tensors of one shape, one weight each, how to prune -> their combination
Combination = Callable[[Sequence[Tensor], Tensor, Pruning], Tensor]


def linear(tensors: Sequence[Tensor], weights: Tensor, pruning: Pruning) -> Tensor:
    """`Σ w_i T_i`."""
    return _weighted(torch.stack(list(tensors)), weights).sum(dim=0)


def magnitude_prune(tensors: Sequence[Tensor], weights: Tensor, pruning: Pruning) -> Tensor:
    """The sum after each tensor has lost its smallest entries."""
    return linear([largest(t, pruning.density) for t in tensors], weights, pruning)


def dare_linear(tensors: Sequence[Tensor], weights: Tensor, pruning: Pruning) -> Tensor:
    """The sum after entries were dropped at random and the others scaled up."""
    return linear([dropped(t, pruning.density) for t in tensors], weights, pruning)


def ties(tensors: Sequence[Tensor], weights: Tensor, pruning: Pruning) -> Tensor:
    """TIES: prune by size, elect signs, and average over those who agree."""
    return _elected([largest(t, pruning.density) for t in tensors], weights, pruning)


def dare_ties(tensors: Sequence[Tensor], weights: Tensor, pruning: Pruning) -> Tensor:
    """DARE's pruning, then TIES' election."""
    return _elected([dropped(t, pruning.density) for t in tensors], weights, pruning)


COMBINATIONS: Mapping[str, Combination] = {
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
#: those that leave entries out
PRUNING = frozenset(COMBINATIONS) - {"linear"}


def _weighted(stacked: Tensor, weights: Tensor) -> Tensor:
    return stacked * weights.view(-1, *[1] * (stacked.dim() - 1))


def largest(tensor: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude; the others zero."""
    if density >= 1:
        return tensor
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    kept[torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices] = 1
    return tensor * kept.view(tensor.shape)


def dropped(tensor: Tensor, density: float) -> Tensor:
    """Entries kept with probability `density` and scaled so that their expectation stays."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _elected(tensors: Sequence[Tensor], weights: Tensor, pruning: Pruning) -> Tensor:
    stacked = torch.stack(list(tensors))
    return mean_of(_weighted(stacked, weights), agreeing(stacked, pruning.majority))


def agreeing(stacked: Tensor, majority: str) -> Tensor:
    """Which entries of `(n, ...)` have the sign that wins at their place, by mass (`"total"`) or by number."""
    sign = stacked.sign()
    mass = (stacked if majority == "total" else sign).sum(dim=0)
    return sign == torch.where(mass >= 0, 1, -1)


def mean_of(stacked: Tensor, counted: Tensor) -> Tensor:
    """The mean, at each place, of those entries of `(n, ...)` that are counted; 0 where none is."""
    return (stacked * counted).sum(dim=0) / counted.sum(dim=0).clamp(min=1.0)


def padded(tensor: Tensor, shape: Sequence[int], blocks: int = 1) -> Tensor:
    """The tensor in the corner of zeros of a shape that is as large or larger; each of the `blocks` that it consists of along
    the first dimension by itself."""
    if tensor.shape == torch.Size(shape):
        return tensor
    if blocks > 1:
        split = (blocks, shape[0] // blocks, *shape[1:])
        return padded(tensor.unflatten(0, (blocks, -1)), split).flatten(0, 1)
    full = tensor.new_zeros(tuple(shape))
    full[tuple(slice(size) for size in tensor.shape)] = tensor
    return full


def closest_factors(
    delta: Tensor, rank: int, clamp: float | None = None, full_matrices: bool = True, driver: str | None = None
) -> tuple[Tensor, Tensor]:
    """`(A, B)` of a rank with `B A` closest to delta `(out, in)`: A `(rank, in)`, B `(out, rank)`, scaled by the singular values.

    Beyond the rank that delta can have, factors are zero. `clamp` limits their entries to a quantile of all.
    """
    U, S, Vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    kept = min(rank, S.numel())
    B, A = U[:, :kept] * S[:kept], Vh[:kept]
    if clamp is not None:
        limit = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    return padded(A, (rank, A.shape[1])), padded(B, (B.shape[0], rank))
