"""Models whose weights transformers splits between processes by tensors."""

from __future__ import annotations

from torch import nn


def parts(model: nn.Module) -> int:
    """Between how many processes each weight is split; 1 for a model that is whole.

    Relied on: transformers notes the number as `_tp_size` on the model that it splits (since 5.0), and reads it there in
    `load_adapter` (in 5.18 and after).
    """
    return getattr(model, "_tp_size", None) or 1
