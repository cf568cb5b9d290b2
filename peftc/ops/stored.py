"""How tensors are stored: bytes of those that libraries make of others. Nothing is computed, so they may be on the meta device."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor as it is stored: of one that a library makes of others, those of these."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(bytes_of(getattr(tensor, name)) for name in names)
