"""What the steps of a training leave behind for one adapter, kept by its session and in checkpoints of the training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class StepState:
    """`values` is the method's own, `options` those that steps changed, `last` the step that was taken last.

    The other fields tell whether the adapter trains although no step is taken: how many steps all optimisers had taken at
    the last forward, and after how many forwards the adapter's own had gone on.
    """

    last: int | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    since: int | None = None
    untold: int = 0
