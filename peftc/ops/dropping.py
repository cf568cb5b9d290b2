"""Dropping parts of an update in training: whole output features, or the update of a whole layer."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_outputs(update: Tensor, dim: int, features: float, whole: float, rescale: bool) -> Tensor:
    """An update without the output features, along dimension `dim`, that `kept_outputs` drops."""
    kept = kept_outputs(update.shape[dim], features, whole, rescale, update)
    if kept is None:
        return update
    return update * kept.view([-1 if d == dim % update.dim() else 1 for d in range(update.dim())])


def kept_outputs(count: int, features: float, whole: float, rescale: bool, like: Tensor) -> Tensor | None:
    """Factors `(count,)` of the output features of an update, zero for those dropped; None if nothing can be.

    `features` is the probability of dropping a feature, `whole` that of dropping them all. With `rescale` the others are
    scaled so that the mean factor stays one; where none is left, all stay zero.
    """
    if not features and not whole:
        return None
    kept = torch.ones(1, device=like.device, dtype=like.dtype)
    if whole:
        kept = (torch.rand(1, device=like.device) > whole).to(like.dtype)
    if features:
        drawn = (torch.rand(count, device=like.device) > features).to(like.dtype)
        kept = kept * (drawn / drawn.mean().clamp(min=1 / count) if rescale else drawn)
    return kept.expand(count)
