"""Models in shards, in one process: a stand-in holds parameters as DeepSpeed's third stage does, and brings them as it does.

Real jobs are in `tests/ecosystem/test_distributed.py`. Every refusal has a mutation under which its test fails.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import (
    PeftcError,
    PeftModel,
    convert_adapter,
    get_peft_model,
    get_peft_model_state_dict,
    rules,
    set_peft_model_state_dict,
)
from peftc.host import parallel
from peftc.model.functions import state
from peftc.model.parts import files
from peftc.runtime.applying import conversion, tuner_model, weighted
from peftc.runtime.around import saved_modules
from peftc.runtime.layer import called
from peftc.runtime.session import drift, session
from peftc.runtime.slots import containers as storage
from peftc.testing.models import seeded
from peftc.testing.subjects import Subject
from tests.defects import put_defect
from tests.runtime.examples import examples, rows, small_layers
from tests.runtime.methods import Net, adapted, narrow, x

EACH = pytest.mark.parametrize("subject", rows(examples(small_layers)))


class Held:
    """What a process has taken out of parameters, to be brought again: all of it, as if there were no other."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def take(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            shape = parameter.shape
            self.values[id(parameter)] = parameter.data
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            parameter.ds_shape = shape  # type: ignore[attr-defined]

    @contextmanager
    def gathered(self, parameters: Any, **options: Any) -> Iterator[None]:
        own = list(parameters)
        for parameter in own:
            parameter.data = self.values[id(parameter)]
        try:
            yield
        finally:
            for parameter in own:
                parameter.data = torch.empty(0, dtype=parameter.dtype)


class ZeROOrderedDict(OrderedDict[str, Any]):
    """Parameters of a module in DeepSpeed's engine: looked up by `[]` they are whole."""

    whole: dict[int, Tensor] = {}
    asked = 0

    def __getitem__(self, name: str) -> Any:
        ZeROOrderedDict.asked += 1
        parameter = super().__getitem__(name)
        if parameter is not None and id(parameter) in self.whole:
            parameter.data = self.whole[id(parameter)]
        return parameter


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """With a `deepspeed` that brings what was taken out."""
    own = Held()
    stand_in: Any = ModuleType("deepspeed")
    stand_in.zero = SimpleNamespace(GatheredParameters=own.gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    return own


def in_engine(model: nn.Module) -> None:
    for module in model.modules():
        module._parameters = ZeROOrderedDict(module._parameters)
        module.register_forward_pre_hook(bring)


def bring(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Before a module is called, its own parameters are made whole."""
    for name in module._parameters:
        module._parameters[name]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: parallel.whole_shape(parameter) for name, parameter in model.named_parameters()}


# planning and applying ------------------------------------------------------------------------------------------------


@EACH
def test_an_adapter_is_planned_and_applied_by_true_shapes(subject: Subject, held: Held) -> None:
    base = subject.model.build()
    held.take(base)
    with seeded(3):
        model = get_peft_model(base, subject.config())
    with seeded(3):
        plain = get_peft_model(subject.model.build(), subject.config())
    assert shapes(model) == shapes(plain)
    own = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in held.values}
    assert own
    for name, parameter in plain.named_parameters():
        if name in own:
            torch.testing.assert_close(own[name], parameter, rtol=0, atol=0)


def applied(held: Held) -> PeftModel:
    base = Net()
    held.take(base)
    return get_peft_model(base, narrow(modules_to_save=["head"]))


def test_a_module_that_is_saved_is_copied_whole(held: Held) -> None:
    model = applied(held)
    head = model.base_model.model.head
    copied = head.modules_to_save["default"]
    assert copied.weight.shape == (3, 6) and head.original_module.weight.shape == (0,)
    assert torch.equal(copied.weight, held.values[id(head.original_module.weight)])


DEFECTS = [
    (drift, "whole_shape(own) != planned.shape", "tuple(own.shape) != planned.shape"),
    (saved_modules, "with parallel.gathering(self.original_module):", "if True:"),
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect[0].__name__)
def test_the_tests_of_shapes_fail_under_a_defect(
    defect: tuple[ModuleType, str, str], held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_defect(monkeypatch, *defect)
    with pytest.raises((PeftcError, AssertionError)):
        test_a_module_that_is_saved_is_copied_whole(held)


# calls ----------------------------------------------------------------------------------------------------------------


@EACH
def test_tensors_that_an_engine_brings_are_looked_up_where_it_does(subject: Subject) -> None:
    model, plain = subject.trained(), subject.trained()
    wanted = subject.output(plain)
    subject.output(model)
    in_engine(model)
    held = Held()
    slots = [
        p for layer in model.session.layers.values() for name in layer.adapters for _, p in layer.parameters_of(name)
    ]
    own = nn.ParameterList([p for p in slots if isinstance(p, nn.Parameter)])
    held.take(own)
    ZeROOrderedDict.whole = held.values
    try:
        found = subject.output(model)
    finally:
        ZeROOrderedDict.whole = {}
    torch.testing.assert_close(found, wanted)


# outside of calls -----------------------------------------------------------------------------------------------------


def started() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(adapted()).items()}


def merge_and_unload(model: Any) -> None:
    model.merge_and_unload()


Ask = Callable[[Any], object]
REFUSED: dict[str, tuple[Ask, ModuleType, str]] = {
    "merge": (
        lambda m: m.merge_adapter(),
        session,
        'refuse_sharded(self.ways_to(self.plans[name] for name in names), "merged, the adapter would be lost")',
    ),
    "merge_and_unload": (
        merge_and_unload,
        tuner_model,
        'refuse_sharded(session.ways_to(plans), "merged, the adapter would be lost")',
    ),
    "combine": (
        lambda m: m.add_weighted_adapter(["default"], [1.0], "combined"),
        weighted,
        'refuse_sharded(session.ways_to(session.plans[name] for name in adapters), "its tensors are not here to be combined")',
    ),
    "convert": (
        lambda m: convert_adapter(m, "NARROW", 2),
        conversion,
        'refuse_sharded(session.ways_to([session.plans[name]]), "its tensors are not here to be converted")',
    ),
    "read": (get_peft_model_state_dict, files, 'refuse_parts(plan, lacking, "it cannot be saved as it is here")'),
    "write": (
        lambda m: set_peft_model_state_dict(m, started()),
        state,
        'refuse_parts(session.plans[fit.name], session.tensors(fit.name), "their values cannot be changed here")',
    ),
}


def engine(held: Held) -> PeftModel:
    model = adapted()
    held.take(model)
    in_engine(model)
    return model


def codes(model: nn.Module, ask: Ask) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ask(model)
        except PeftcError as error:
            return [found.code for found in error.diagnostics]
        except (IndexError, RuntimeError, ValueError) as error:
            return [repr(error)]
    return [w.message.diagnostic.code for w in caught if hasattr(w.message, "diagnostic")]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_done_to_a_part_is_refused(name: str, held: Held) -> None:
    assert codes(engine(held), REFUSED[name][0]) == [rules.WEIGHT_ELSEWHERE.code]


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "merge_and_unload"])  # which merges
def test_the_refusal_fails_under_a_defect(name: str, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, module, line = REFUSED[name]
    put_defect(monkeypatch, module, line, "()")
    if name == "merge":
        put_defect(monkeypatch, parallel, "return taken_out or", "return False and")
    assert codes(engine(held), ask) != [rules.WEIGHT_ELSEWHERE.code]


def test_an_adapter_beside_shards_is_warned_of(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(model: Any) -> None:
        model.add_adapter("another", narrow())

    assert codes(engine(held), add) == [rules.BESIDE_SHARDS.code]
    put_defect(monkeypatch, session, "note_adding(self.model, self.ways_to([plan]))", "()")
    assert codes(engine(held), add) == []


def test_parts_of_a_flat_tensor_have_no_shape() -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter._fsdp_flattened = True  # type: ignore[attr-defined]
    for ask in (lambda m: m.add_adapter("another", narrow()), lambda m: m.base_model.model.first.merge()):
        assert codes(model, ask) == [rules.WEIGHT_ELSEWHERE.code]


# hooks that call ------------------------------------------------------------------------------------------------------


def needs_an_input(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """As opacus has them: the input is kept for the gradients of single samples."""
    assert args[0] is not None


def hooked(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, storage.SlotModule):
            module.register_forward_hook(needs_an_input)
    return model


def test_a_hook_gets_the_input_of_factors() -> None:
    model, given = adapted(), x()
    wanted = model(given)
    torch.testing.assert_close(hooked(model)(given), wanted)


def test_a_hook_that_needs_an_input_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(model: Any) -> None:
        model(x())

    monkeypatch.setattr(called, "_factors", lambda part: None)  # as of methods that do more than multiply
    assert codes(hooked(adapted()), ask) == [rules.SLOT_CALLED.code]
    put_defect(monkeypatch, called, "    except (LookupError, TypeError,", "    except (TypeError,")
    with pytest.raises(IndexError):
        hooked(adapted())(x())


def test_a_slot_of_a_convolution_does_not_step_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    slot = storage.SlotModule.holding(weight=nn.Parameter(torch.ones(2, 3, 1, 1)))
    slot.__dict__["tails"] = ("weight",)
    assert codes(slot, lambda module: module(torch.ones(1, 3, 4, 4))) == [rules.SLOT_CALLED.code]
    put_defect(monkeypatch, storage, "if tensor.dim() != 2:", "if False:")
    assert codes(slot, lambda module: module(torch.ones(1, 3, 4, 4))) != [rules.SLOT_CALLED.code]
