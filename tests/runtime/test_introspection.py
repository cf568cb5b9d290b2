"""Models can be looked through: no attribute raises anything but an `AttributeError`, in no state, for no method."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from peftc import PeftModel
from peftc.diagnostics import PeftcError
from peftc.registry.manager import default_registry
from peftc.testing.subjects import Subject, subjects
from tests.unit.chosen import plain_method

METHODS = [default_registry().get(name) for name in default_registry().names]
EACH = [next(s for s in subjects(method) if s.model.is_language_model) for method in METHODS if subjects(method)]

STATES: dict[str, Callable[[PeftModel], Any]] = {
    "fresh": lambda model: None,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "without an adapter": lambda model: model.delete_adapter("default"),
    "unloaded": lambda model: model.unload(),
}


def parts(model: nn.Module) -> Iterator[Any]:
    """The model, and one object of each of our classes in it."""
    yield from {type(m): m for m in model.modules() if type(m).__module__.startswith("peftc")}.values()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("subject", EACH, ids=lambda s: s.method.peft_type)
def test_every_attribute_can_be_asked_for(subject: Subject, state: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = subject.wrap()
        try:
            STATES[state](model)
        except (PeftcError, AttributeError):
            pytest.skip("the method cannot be in that state")
        for part in (model, model.base_model, *parts(model)):
            inspect.getmembers(part)


def test_what_a_property_says_is_not_lost() -> None:
    model = EACH[0].wrap()
    tuner = model.base_model
    model.unload()
    for owner in (model, tuner):
        assert not hasattr(owner, "session")
        with pytest.raises(PeftcError, match="has no adapter any more"):
            _ = owner.session


def test_an_adapted_model_is_traced() -> None:
    """The same operations with gradients and without, which torch compares."""
    subject = next(s for s in subjects(plain_method()) if not s.model.is_language_model)
    model, (x,) = subject.trained(), subject.model.arguments().values()
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x + 1), model(x + 1))
