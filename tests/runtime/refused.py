"""What must hold of a model that refused something: the words were said, and every tensor, flag and module is as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from peftc import PeftcError, PeftcWarning, PeftModel
from peftc.diagnostics import Rule


@dataclass(frozen=True)
class Case:
    """A model, something that is asked of it in vain, what is said, and the defect that spoils the refusal."""

    rule: Rule
    start: Callable[[], nn.Module]
    act: Callable[[Any], object]
    defect: tuple[ModuleType, str, str]
    says: str


class Image:
    """All that a refusal must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.trains = {name: parameter.requires_grad for name, parameter in self.parameters.items()}
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.attributes = {path: sorted(vars(module)) for path, module in self.modules.items()}
        wrapped = model if isinstance(model, PeftModel) and model.peft_config else None
        self.adapters = list(wrapped.peft_config) if wrapped else []
        self.active = wrapped.active_adapters if wrapped else []

    def is_of(self, other: Image) -> bool:
        return (
            list(self.modules.items()) == list(other.modules.items())
            and list(self.parameters) == list(other.parameters)
            and all(parameter is other.parameters[name] for name, parameter in self.parameters.items())
            and (self.trains, self.attributes) == (other.trains, other.attributes)
            and all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
            and (self.adapters, self.active) == (other.adapters, other.active)
        )


def told(act: Callable[[], object]) -> list[Any]:
    """Diagnostics that are raised or shown. Under a defect the action may raise something else."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        try:
            act()
        except PeftcError as error:
            return list(error.diagnostics)
    return [w.message.diagnostic for w in shown if isinstance(w.message, PeftcWarning)]


def failure(case: Case) -> str:
    """Why the case fails; empty if it holds."""
    model = case.start()
    before = Image(model)
    try:
        found = told(lambda: case.act(model))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return found_wrong(case.rule, case.says, found) or ("" if Image(model).is_of(before) else "the model is another")


def found_wrong(rule: Rule, says: str, found: list[Any]) -> str:
    """What is wrong with the diagnostics of a case; empty if they are what they should be."""
    if {diagnostic.code for diagnostic in found} != {rule.code}:
        return f"not {rule.code}: {[str(diagnostic) for diagnostic in found]}"
    if says not in "\n".join(map(str, found)):
        return f"not in so many words: {found[0]}"
    return ""
