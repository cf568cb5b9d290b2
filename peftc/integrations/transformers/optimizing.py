"""The optimiser that a `train` section names, as transformers' `Trainer` takes it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peftc.compiler.of_spec import optimizer_problems
from peftc.config.sections import TrainSection
from peftc.diagnostics import PeftcError
from peftc.model.peft_model import PeftModel
from peftc.registry.boundary import boundary
from peftc.registry.optimizers import ChosenOptimizer


def optimizing(chosen: ChosenOptimizer, model: PeftModel, how: TrainSection) -> dict[str, Any]:
    """Keywords of `Trainer`: a class with its own, for which `Trainer` spares biases and norms the decay, or an optimiser that is
    made for the adapters. Of the model it may freeze factors. Raises `PeftcError` for adapters that it is not for."""
    record, options = chosen.record, chosen.options
    if record.make is None:
        module, _, name = record.cls.partition(":")
        own = {"lr": how.learning_rate, **options.model_dump(), **record.fixed}
        return {"optimizer_cls_and_kwargs": (getattr(import_module(module), name), own)}
    plans = model.session.plans
    found = [told for name in model.active_adapters for told in optimizer_problems(record, plans[name])]
    if found:
        raise PeftcError(found)
    with boundary(f"the optimiser `{record.name}`", "make"):
        made = record.make(model, options, how.learning_rate, how.weight_decay)
    return {"optimizers": (made, None)}
