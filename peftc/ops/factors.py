"""Thin factors of a change of a weight: the closest ones of a rank, or of the rank that keeps a share of its energy.

By singular values (Eckart and Young, 1936). A change that is thin already is never made dense: its factors go through two
QR decompositions, and only their small product is decomposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """`change ≈ B A`, A `(rank, in)`, B `(out, rank)`. `norm` is the change's Frobenius norm, `lost` that of what is left out."""

    A: Tensor
    B: Tensor
    norm: float
    lost: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def error(self) -> float:
        """Relative error in the Frobenius norm; 0 for a change that is zero."""
        return self.lost / self.norm if self.norm else 0.0


def of_dense(change: Tensor, rank: int | float) -> Factors:
    """Factors of a change `(out, in)`; a `rank` between 0 and 1 is the share of the squared singular values to keep."""
    U, S, Vh = torch.linalg.svd(_exact(change), full_matrices=False)
    return _cut(U, S, Vh, rank)


def of_thin(A: Tensor, B: Tensor, rank: int | float) -> Factors:
    """Factors of the change `B A`. As they are, if their rank is not above the one that is asked for."""
    A, B = _exact(A), _exact(B)
    if isinstance(rank, int) and A.shape[0] <= rank:
        norm = math.sqrt(max(0.0, float(((B.t() @ B) * (A @ A.t())).sum())))
        return Factors(A, B, norm, 0.0)
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.t())
    U, S, Vh = torch.linalg.svd(left.R @ right.R.t(), full_matrices=False)
    return _cut(left.Q @ U, S, Vh @ right.Q.t(), rank)


def _exact(tensor: Tensor) -> Tensor:
    """In a precision that can be decomposed."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _cut(U: Tensor, S: Tensor, Vh: Tensor, rank: int | float) -> Factors:
    energy = S.double().square()
    kept = min(rank, S.numel()) if isinstance(rank, int) else _rank_of(energy, rank)
    norm, lost = (math.sqrt(float(part.sum())) for part in (energy, energy[kept:]))
    return Factors(Vh[:kept].contiguous(), (U[:, :kept] * S[:kept]).contiguous(), norm, lost)


def _rank_of(energy: Tensor, share: float) -> int:
    """The smallest rank, at least 1, that keeps a share of the energy."""
    reached = energy.cumsum(0)
    return min(int(torch.searchsorted(reached, share * reached[-1])) + 1, energy.numel())
