"""Multitask prompt tuning: one table for all tasks, times a thin matrix for each (Wang et al., arXiv:2303.02861, section 3.2).

Calls say the task of each row. The start may come from an adapter that was trained on other tasks before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

from peftc.plugin import (
    Field,
    PeftcError,
    PeftType,
    Place,
    PromptContext,
    PromptTuner,
    PromptView,
    Slot,
    TunerMethod,
    hookimpl,
    model_validator,
    module_slot,
    parameter_slot,
    read_weights,
    rules,
)

from .prompt_tuning import PromptTuningConfig, PromptTuningInit, start_of_table

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.plugin import Tensors

_COLS, _ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(StrEnum):
    """How the virtual tokens start."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


#: Starts that need an adapter trained before.
_FROM_SOURCE = frozenset(list(MultitaskPromptTuningInit)[2:])


class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Options of a multitask prompt-tuning adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("MULTITASK_PROMPT_TUNING")
    prompt_tuning_init: MultitaskPromptTuningInit = Field(  # type: ignore[assignment]  # the reference has two enums too
        default=MultitaskPromptTuningInit.RANDOM, strict=False
    )
    """How the virtual tokens start: `RANDOM`, as a text (`TEXT`), or from an adapter trained before: with the mean of its
    tasks' matrices (`AVERAGE_SOURCE_TASKS`), those of one task (`EXACT_SOURCE_TASK`), or new ones (`ONLY_SOURCE_SHARED`)."""
    prompt_tuning_init_state_dict_path: str | None = None
    """The safetensors file, or adapter folder, of the adapter trained before."""
    prompt_tuning_init_task: int | None = Field(default=0, ge=0)
    """The task, for `EXACT_SOURCE_TASK`."""
    num_ranks: int | None = Field(default=1, ge=1)
    """Rank of the tasks' matrices."""
    num_tasks: int | None = Field(default=1, ge=1)
    """Number of tasks."""

    @model_validator(mode="after")
    def _source_needs_path(self) -> Self:
        if self.prompt_tuning_init in _FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ValueError(f"`{self.prompt_tuning_init}` needs `prompt_tuning_init_state_dict_path`")
        single = self.prompt_tuning_init in _FROM_SOURCE - {MultitaskPromptTuningInit.ONLY_SOURCE_SHARED}
        if single and self.num_tasks not in (None, 1):
            raise ValueError(f"`{self.prompt_tuning_init}` starts one task: set `num_tasks: 1`")
        return self


class MultitaskPromptTuner(PromptTuner[MultitaskPromptTuningConfig]):
    """`P = P* ∘ (u v)`: the shared table times each task's columns `u` and rows `v`."""

    place = Place.INPUTS

    def slots(self, c: MultitaskPromptTuningConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        yield module_slot("embedding", (_many(c), c.token_dim or 0))
        for key, shape in self.extra(c, dims).items():
            yield parameter_slot(key, shape)

    def extra(self, c: MultitaskPromptTuningConfig, dims: Mapping[str, int]) -> Mapping[str, tuple[int, ...]]:
        tasks, ranks = c.num_tasks or 1, c.num_ranks or 1
        return {_COLS: (tasks, _many(c), ranks), _ROWS: (tasks, ranks, c.token_dim or 0)}

    def export(self, c: MultitaskPromptTuningConfig, a: PromptView) -> Tensors:
        return {_COLS: a[_COLS].detach(), _ROWS: a[_ROWS].detach()}

    def init(self, c: MultitaskPromptTuningConfig, slots: Mapping[str, Tensor], context: PromptContext) -> None:
        if c.prompt_tuning_init in _FROM_SOURCE:
            context.init.skip_normal(slots["embedding"])
        else:
            start_of_table(c, PromptTuningInit(c.prompt_tuning_init), slots["embedding"], context)
        for key in (_COLS, _ROWS):
            context.init.normal(slots[key], 0.02)
        if c.prompt_tuning_init not in _FROM_SOURCE:
            return
        for key, tensor in _source(c).items():
            slot = slots["embedding" if key == "prompt_embeddings" else key]
            if slot.shape != tensor.shape:
                what = f"`{key}` of the source is {tuple(tensor.shape)}, not {tuple(slot.shape)}"
                raise PeftcError(rules.TABLE_REFUSED(what, fix="Use the sizes that the source was trained with."))
            slot.copy_(tensor)

    def embeds(self, c: MultitaskPromptTuningConfig, a: PromptView) -> Tensor:
        return a["embedding"]

    def tasks(self, c: MultitaskPromptTuningConfig) -> int | None:
        return c.num_tasks or 1

    def of_tasks(self, c: MultitaskPromptTuningConfig, a: PromptView, task_ids: Tensor) -> Tensor:
        """The shared table times the matrix of each row's task, `(batch, rows, width)`."""
        ids = task_ids.to(a[_COLS].device)
        return a["embedding"] * (a[_COLS][ids] @ a[_ROWS][ids])

    def restore(self, c: MultitaskPromptTuningConfig, saved: Tensors) -> Mapping[str, Tensor]:
        return {"embedding" if key == "prompt_embeddings" else key: tensor for key, tensor in saved.items()}


def _many(c: MultitaskPromptTuningConfig) -> int:
    return (c.num_virtual_tokens or 0) * (c.num_transformer_submodules or 1)


def _source(c: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    """What to start from, by key. Raises `PeftcError` for a file that cannot be read or lacks a tensor or task."""
    path = Path(c.prompt_tuning_init_state_dict_path or "")
    saved = read_weights(path)
    shared_only = c.prompt_tuning_init == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED
    keys = ("prompt_embeddings",) if shared_only else ("prompt_embeddings", _COLS, _ROWS)
    lacks = [key for key in keys if key not in saved]
    if lacks:
        what = f"`{path}` has no `{lacks[0]}`"
        raise PeftcError(rules.TABLE_REFUSED(what, fix="Name the file of a multitask prompt."))
    found = {key: saved[key] for key in keys}
    task = c.prompt_tuning_init_task or 0
    for key in keys[1:]:
        if c.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
            found[key] = saved[key].mean(0, keepdim=True)
        elif task >= saved[key].shape[0]:
            what = f"The source has {saved[key].shape[0]} tasks, none of them is {task}"
            raise PeftcError(rules.BAD_VALUE(what, fix="Correct the task.", where="prompt_tuning_init_task"))
        else:
            found[key] = saved[key][task : task + 1]
    return found


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "MULTITASK_PROMPT_TUNING",
        MultitaskPromptTuningConfig,
        MultitaskPromptTuner(),
        prefix="multitask_prompt_tuning_",
        encoder_class="MultitaskPromptEmbedding",
        exports={"MultitaskPromptTuningInit": MultitaskPromptTuningInit},
        summary="Virtual tokens before the input, shared by tasks and scaled for each.",
        paper="arXiv:2303.02861",
        examples=(
            {"num_virtual_tokens": 4, "num_ranks": 2},
            {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2},
        ),
        identity_at_start=lambda c: False,
    )
