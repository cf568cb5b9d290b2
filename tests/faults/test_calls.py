"""A failure at any call that peftc makes leaves a model as it was: bits, objects, flags, hooks, names, what is active.

Every place of the code that an operation passes is tried, with the first time and the last time that it comes by, over all
methods together; `python -m tests.faults` tries every single call, for each method, and with `--all-kinds` every kind of failure.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from peftc.registry.manager import default_registry
from peftc.runtime import collector
from peftc.runtime.applying import apply
from peftc.runtime.around import saved_modules
from peftc.runtime.layer import merging
from peftc.runtime.layer import wrapper as layer
from peftc.runtime.session import session
from tests.defects import put_defect
from tests.faults.injection import Place, lines
from tests.faults.operations import NAMES, Case, operations, operations_of
from tests.faults.picture import differences, picture
from tests.faults.runs import counted, failed, new
from tests.unit.chosen import plain_method

METHODS = default_registry().names


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_at_any_call_leaves_everything_as_it_was(name: str) -> None:
    """Places that methods have in common are tried with the first of them."""
    wrong, seen = [], set[tuple[Place, bool]]()
    for method in METHODS:
        for operation in operations_of(method):
            if operation.name == name:
                numbers = list(new(counted(operation), seen))
                told = failed(operation, numbers) if numbers else ()
                wrong += [f"{method}, {operation}: {what}" for what in told]
    assert wrong == []


def test_every_operation_is_tried() -> None:
    assert {operation.name for method in METHODS for operation in operations_of(method)} == set(NAMES)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(plain_method().peft_type)


def test_an_interrupt_on_any_line_leaves_everything_as_it_was(case: Case) -> None:
    """The first and the last time that any operation comes by; `python -m tests.faults --lines` tries all of them."""
    wrong, seen = [], set[tuple[Place, bool]]()
    for operation in operations(case):
        numbers = list(new(counted(operation, lines), seen))
        wrong += [f"{operation}: {told}" for told in failed(operation, numbers, lines, [KeyboardInterrupt])]
    assert wrong == []


DEFECTS: dict[str, tuple[str, ModuleType, str, str]] = {
    "a plan": ("add_adapter", session, "keep_entry(known, plan.name)", "pass"),
    "the sites of a layer": ("add_adapter", layer, "keep_entry(known, adapter)", "pass"),
    "a wrapper": ("get_peft_model", session, "keep_entry(parent._modules, name)\n        parent._modules[name] = wrapper", "parent._modules[name] = wrapper"),
    "a flag": ("set_adapter", layer, "keep_trained(parameter, trainable and requires_grad)", "parameter.requires_grad_(trainable and requires_grad)"),
    "what is active": ("set_adapter", session, "keep(self.shared)\n        self.shared.gated", "self.shared.gated"),
    "a copy": ("delete_adapter", saved_modules, "keep_entries(self.modules_to_save._modules)", "pass"),
    "merged weights": ("merge_adapter", merging, "keep_entries(self.merged_adapters, self._pristine, base._parameters, base._buffers)", "pass"),
    "frozen weights": ("get_peft_model", apply, "keep_trained(parameter, False)", "parameter.requires_grad_(False)"),
    "the collector": ("add_adapter", collector, "note(gc.enable)", "pass"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_what_is_not_kept_is_noticed(
    case: Case, defect: tuple[str, ModuleType, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, module, before, after = defect
    put_defect(monkeypatch, module, before, after)
    operation = next(operation for operation in operations(case) if operation.name == name)
    assert next(failed(operation, new(counted(operation), set())), None) is not None


def test_memory_that_stays_full_does_not_keep_it_from_being_put_back(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put back needs none: from some allocation on, all of them fail."""
    names = ("empty", "full", "zeros", "empty_like")
    for operation in filter(counted, operations(case)):
        for number in range(1, 12):
            left = number

            def allocate(*args: object, made: object = None, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left <= 0:
                    raise torch.OutOfMemoryError("out of memory")
                return made(*args, **kwargs)  # type: ignore[operator]

            model = operation.begin()
            before = picture(model)
            with monkeypatch.context() as patch:
                for name in names:
                    own = getattr(torch, name)
                    patch.setattr(torch, name, lambda *a, own=own, **k: allocate(*a, made=own, **k))
                patch.setattr(torch.Tensor, "clone", lambda t, own=torch.Tensor.clone, **k: allocate(t, made=own, **k))
                try:
                    operation.act(model)
                except torch.OutOfMemoryError as error:
                    assert getattr(error, "__notes__", []) == []
                else:
                    break
            assert differences(before, picture(model)) == [], f"{operation}, allocation {number}"
