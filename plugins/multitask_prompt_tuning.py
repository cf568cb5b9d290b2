"""Multitask prompt tuning: virtual tokens before the input, shared by tasks and scaled for each (Wang et al.,
arXiv:2303.02861, section 3.2).

All tasks have one table, and each a thin matrix that it is multiplied by. Calls say the task of each row. The start may come
from an adapter that was trained on other tasks before.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Self

from peftc import plugin as p

from .prompt_tuning import PromptTuningConfig, PromptTuningInit, start_of_table

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

    peft_type: p.PeftType | None = p.PeftType("MULTITASK_PROMPT_TUNING")
    prompt_tuning_init: MultitaskPromptTuningInit = p.Field(  # type: ignore[assignment]  # the reference has two enums too
        default=MultitaskPromptTuningInit.RANDOM, strict=False
    )
    """How the virtual tokens start: `RANDOM`, as a text (`TEXT`), or from an adapter trained before: with the mean of its
    tasks' matrices (`AVERAGE_SOURCE_TASKS`), those of one task (`EXACT_SOURCE_TASK`), or new ones (`ONLY_SOURCE_SHARED`)."""
    prompt_tuning_init_state_dict_path: str | None = None
    """The safetensors file, or adapter folder, of the adapter trained before."""
    prompt_tuning_init_task: int | None = p.Field(default=0, ge=0)
    """The task, for `EXACT_SOURCE_TASK`."""
    num_ranks: int | None = p.Field(default=1, ge=1)
    """Rank of the tasks' matrices."""
    num_tasks: int | None = p.Field(default=1, ge=1)
    """Number of tasks."""

    @p.model_validator(mode="after")
    def _source_needs_path(self) -> Self:
        if self.prompt_tuning_init in _FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ValueError(f"`{self.prompt_tuning_init}` needs `prompt_tuning_init_state_dict_path`")
        single = self.prompt_tuning_init in _FROM_SOURCE - {MultitaskPromptTuningInit.ONLY_SOURCE_SHARED}
        if single and self.num_tasks not in (None, 1):
            raise ValueError(f"`{self.prompt_tuning_init}` starts one task: set `num_tasks: 1`")
        return self


class MultitaskPromptTuner(p.PromptTuner[MultitaskPromptTuningConfig]):
    """`P = P* ∘ (u v)`: the shared table times each task's columns `u` and rows `v`."""

    place = p.Place.INPUTS

    def slots(self, c: MultitaskPromptTuningConfig, dims: p.Dims) -> p.Slots:
        yield p.module_slot("embedding", (c.rows, c.width))
        for key, shape in self.extra(c, dims).items():
            yield p.parameter_slot(key, shape)

    def extra(self, c: MultitaskPromptTuningConfig, dims: p.Dims) -> p.Shapes:
        tasks, ranks = c.num_tasks or 1, c.num_ranks or 1
        return {_COLS: (tasks, c.rows, ranks), _ROWS: (tasks, ranks, c.width)}

    def export(self, c: MultitaskPromptTuningConfig, a: p.PromptView) -> p.Tensors:
        return {_COLS: a[_COLS].detach(), _ROWS: a[_ROWS].detach()}

    def init(self, c: MultitaskPromptTuningConfig, slots: p.Tensors, context: p.PromptContext) -> None:
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
                raise p.PeftcError(p.rules.TABLE_REFUSED(what, fix="Use the sizes that the source was trained with."))
            slot.copy_(tensor)

    def tasks(self, c: MultitaskPromptTuningConfig) -> int | None:
        return c.num_tasks or 1

    def of_tasks(self, c: MultitaskPromptTuningConfig, a: p.PromptView, task_ids: p.Tensor) -> p.Tensor:
        """The shared table times the matrix of each row's task, `(batch, rows, width)`."""
        ids = task_ids.to(a[_COLS].device)
        return a["embedding"] * (a[_COLS][ids] @ a[_ROWS][ids])


def _source(c: MultitaskPromptTuningConfig) -> dict[str, p.Tensor]:
    """What to start from, by key. Raises `PeftcError` for a file that cannot be read or lacks a tensor or task."""
    path = Path(c.prompt_tuning_init_state_dict_path or "")
    saved = p.read_weights(path)
    shared_only = c.prompt_tuning_init == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED
    keys = ("prompt_embeddings",) if shared_only else ("prompt_embeddings", _COLS, _ROWS)
    lacks = [key for key in keys if key not in saved]
    if lacks:
        what = f"`{path}` has no `{lacks[0]}`"
        raise p.PeftcError(p.rules.TABLE_REFUSED(what, fix="Name the file of a multitask prompt."))
    found = {key: saved[key] for key in keys}
    task = c.prompt_tuning_init_task or 0
    for key in keys[1:]:
        if c.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
            found[key] = saved[key].mean(0, keepdim=True)
        elif task >= saved[key].shape[0]:
            what = f"The source has {saved[key].shape[0]} tasks, none of them is {task}"
            raise p.PeftcError(p.rules.BAD_VALUE(what, fix="Correct the task.", where="prompt_tuning_init_task"))
        else:
            found[key] = saved[key][task : task + 1]
    return found


peftc_tuner = p.method(
    MultitaskPromptTuningConfig,
    MultitaskPromptTuner(),
    prefix="multitask_prompt_tuning_",
    encoder_class="MultitaskPromptEmbedding",
    exports=(MultitaskPromptTuningInit,),
    examples=(
        {"num_virtual_tokens": 4, "num_ranks": 2},
        {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2},
    ),
)
