"""Calls by task, as a table: what of a call is as long as its input, and so has to grow with it.

Outputs are not cut: a model with a prompt answers for the virtual tokens too, as the reference does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftc.config.types import TaskType


@dataclass(frozen=True)
class TaskCall:
    """How calls of a task look. `labels` says that there is one for each input token (of the decoder, if there is one);
    `token_types` that they mean something: elsewhere they are left out, with a warning."""

    labels: bool
    token_types: bool


CALLS: Mapping[TaskType, TaskCall] = {
    TaskType.CAUSAL_LM: TaskCall(labels=True, token_types=False),
    TaskType.SEQ_2_SEQ_LM: TaskCall(labels=True, token_types=False),
    TaskType.SEQ_CLS: TaskCall(labels=False, token_types=True),
    TaskType.TOKEN_CLS: TaskCall(labels=True, token_types=True),
    TaskType.QUESTION_ANS: TaskCall(labels=False, token_types=True),
    TaskType.FEATURE_EXTRACTION: TaskCall(labels=False, token_types=False),
}

_UNKNOWN = TaskCall(labels=True, token_types=False)


def call_of(task: TaskType | None) -> TaskCall:
    """The task's row; without a task type, that of a language model."""
    return CALLS.get(task, _UNKNOWN) if task is not None else _UNKNOWN


def widened(tensor: Tensor, tokens: int, value: int) -> Tensor:
    """`(batch, length)` with `tokens` columns of a value in front; what is not of that form is left as it is."""
    if tensor.dim() != 2:
        return tensor
    return torch.cat([tensor.new_full((tensor.shape[0], tokens), value), tensor], dim=1)
