"""What a method may ask for after a step of training: tensors zeroed in part, slots that start or stop training, options.

The method says it and the core does it, so that it is recorded, saved with a training's checkpoints, and all or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Changes:
    """The answer of `MapTuner.on_step`. Places are `(path of the layer, label of the slot)`."""

    #: boolean tensors of the slots' shapes: where they are False, the slot becomes zero
    masks: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    #: of slots that can train, whether they do from now on
    trainable: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    #: new values of some of the tuner's `step_options`
    options: Mapping[str, Any] = field(default_factory=dict)
