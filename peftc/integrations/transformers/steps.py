"""What tells an adapter's method about the steps of transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from peftc.diagnostics import warn
from peftc.model.injected import adapters_of
from peftc.runtime.session.steps import schedule_problems, stepping, take


class AdapterSteps(TrainerCallback):
    """Let the methods of adapters that train act after each optimiser step: `Trainer(..., callbacks=[AdapterSteps()])`.

    Warns at the beginning of what the adapters' options do not get from a training of this length. Adapters whose methods
    need no steps are left alone.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **rest: Any) -> None:
        if model is not None:
            warn(schedule_problems(adapters_of(model), state.max_steps))

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **rest: Any
    ) -> None:
        session = None if model is None else adapters_of(model)
        if session is not None and stepping(session):
            take(session, state.global_step + 1)
