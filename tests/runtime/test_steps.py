"""What training does beyond the optimiser, on a method made for it: changes after steps, a term in the loss, and shapes
that training comes to, in files and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftc import (
    PeftcError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    rules,
    set_peft_model_state_dict,
)
from peftc.diagnostics import Rule
from peftc.helpers import take_step
from peftc.plugin import Diagnostic
from peftc.runtime.session import steps
from peftc.runtime.session.steps import restore_step_states, step_states
from tests.defects import put_defect
from tests.runtime.methods import Net, narrow
from tests.runtime.refused import told
from tests.runtime.shrink import FULL, METHOD, ShrinkConfig
from tests.unit.fakes import registered


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(METHOD):
        yield


class Scored(Net):
    """A net whose output has a loss."""

    def forward(self, x: Tensor, scored: bool = True) -> Any:
        out = super().forward(x)
        return SimpleNamespace(logits=out, loss=out.square().mean() if scored else None)


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 40).view(5, 8)


def config(**options: Any) -> ShrinkConfig:
    return ShrinkConfig(**{"target_modules": ["first", "second"], **options})


def base() -> Scored:
    torch.manual_seed(0)
    return Scored()


def model(**options: Any) -> PeftModel:
    return get_peft_model(base(), config(**options)).train()


def backward(m: PeftModel) -> float:
    loss = m(inputs()).loss
    loss.backward()
    return float(loss.detach())


def train(m: PeftModel, first: int = 1, last: int = 2) -> PeftModel:
    """Optimiser steps, each told to the method."""
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1)
    for step in range(first, last + 1):
        backward(m)
        optimizer.step()
        take_step(m, step)
        optimizer.zero_grad()
    return m


def tensors(m: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in m.named_parameters() if "shrink_" in name}


def rows_left(m: PeftModel, layer: str = "first") -> int:
    v = m.get_base_model().get_submodule(layer).shrink_v["default"]
    return int((v.abs().sum(1) > 0).sum())


# steps ----------------------------------------------------------------------------------------------------------------


def test_a_step_zeroes_what_the_method_says_and_records_the_options() -> None:
    m = model()
    train(m, last=1)
    assert rows_left(m) == FULL
    train(m, 2, 2)
    assert rows_left(m) < FULL
    assert m.peft_config["default"].left == {name: rows_left(m, name) for name in ("first", "second")}
    assert m.session.plans["default"].config.left == m.peft_config["default"].left


def test_a_slot_stops_training_until_it_is_let_go() -> None:
    m = train(model(), last=3)
    b = m.get_base_model().first.shrink_b["default"]
    assert not b.requires_grad and m.get_base_model().first.shrink_v["default"].requires_grad
    m.set_adapter("default")
    assert not b.requires_grad, "activating it again does not undo it"
    train(m, 4, 4)
    assert b.requires_grad


def test_adapters_made_of_one_config_do_not_share_what_training_comes_to() -> None:
    one = config()
    m = get_peft_model(Scored(), one).train()
    m.add_adapter("other", one)
    train(m)
    assert m.peft_config["default"] is one and one.left is not None, (
        "the config that was handed over tells what came of it"
    )
    assert m.peft_config["other"].left is None


def test_only_adapters_that_train_take_a_step() -> None:
    m = model()
    m.add_adapter("other", config())
    backward(m)
    assert m.base_model.take_step(1) == ("default",)
    assert set(m.session.steps) == {"default"}


def test_a_methods_own_functions_are_on_its_model_class_and_on_the_model() -> None:
    m = model()
    assert type(m.base_model).__name__ == "ShrinkModel"
    assert m.base_model.shrunk() == m.shrunk() == 1


def test_what_steps_left_behind_goes_on_in_another_process() -> None:
    whole, half = train(model(), last=5), train(model(), last=3)
    stored, values = step_states(half.session), tensors(half)
    again = model()
    with torch.no_grad():
        for name, p in again.named_parameters():
            if name in values:
                p.copy_(values[name])
    restore_step_states(again.session, stored)
    assert again.peft_config["default"].left == half.peft_config["default"].left
    assert not again.get_base_model().first.shrink_b["default"].requires_grad
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            stored["default"]["values"].values(), half.session.steps["default"].values.values(), strict=True
        )
    )
    assert whole.peft_config["default"].left == again.peft_config["default"].left


def test_deleting_an_adapter_forgets_its_steps() -> None:
    m = train(model())
    m.add_adapter("other", config())
    m.delete_adapter("default")
    assert not m.session.steps


# loss -----------------------------------------------------------------------------------------------------------------


def test_a_method_adds_to_the_loss_in_training_only() -> None:
    m = model()
    plain = float(m.eval()(inputs()).loss.detach())
    assert backward(m.train()) == pytest.approx(plain + 10)
    grad = m.get_base_model().first.shrink_b["default"].grad
    assert grad is not None and grad.abs().max() > 0.9, "the term has gradients"
    assert float(m.base_model(inputs()).loss.detach()) == pytest.approx(plain + 10)
    assert m(inputs(), scored=False).loss is None
    m.set_requires_grad("default", False)
    assert float(m(inputs()).loss) == pytest.approx(plain), "a frozen adapter adds nothing"


# files ----------------------------------------------------------------------------------------------------------------


def test_what_training_came_to_is_saved_and_loaded(tmp_path: Path) -> None:
    m = train(model())
    y = m.eval()(inputs()).logits
    m.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored["base_model.model.first.shrink_v"]) == rows_left(m)
    assert "base_model.model.first.count" not in stored
    planned = json.loads((tmp_path / "peftc_plan.json").read_text(encoding="utf-8"))
    assert f"[{rows_left(m)}, 8]" in json.dumps(planned), "the plan beside it has the same shapes"
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert loaded.get_base_model().first.shrink_v["default"].shape == (rows_left(m), 8)
    assert loaded.get_base_model().first.count["default"].item() == FULL
    torch.testing.assert_close(loaded(inputs()).logits, y)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], stored[key]) for key in stored)


def test_a_trained_adapter_goes_back_into_one_that_has_all_rows(tmp_path: Path) -> None:
    m = train(model())
    m.save_pretrained(tmp_path)
    y = m.eval()(inputs()).logits
    fresh = model()
    before = dict(fresh.named_parameters())
    assert fresh.load_adapter(tmp_path, "default", is_trainable=True).is_clean
    assert dict(fresh.named_parameters()).items() == before.items(), "in place: an optimiser may hold them"
    torch.testing.assert_close(fresh.eval()(inputs()).logits, y)
    assert fresh.peft_config["default"].left == m.peft_config["default"].left
    other = model()
    assert not any(set_peft_model_state_dict(other, get_peft_model_state_dict(m)))
    torch.testing.assert_close(other.eval()(inputs()).logits, y)


def test_a_load_that_fails_leaves_the_adapter_with_all_that_it_had(tmp_path: Path) -> None:
    m = train(model(), last=2)
    before = tensors(m)
    narrow_model = get_peft_model(Net(), narrow())
    narrow_model.save_pretrained(tmp_path)
    with pytest.raises(PeftcError):
        m.load_adapter(tmp_path, "default")
    assert all(torch.equal(a, before[name]) for name, a in tensors(m).items())


def test_an_adapter_takes_the_form_that_is_saved_of_it() -> None:
    m = train(model(), last=2)
    y, saved = m.eval()(inputs()).logits, get_peft_model_state_dict(m)
    m.base_model.take_saved_form("default")
    assert m.get_base_model().first.shrink_v["default"].shape == saved["base_model.model.first.shrink_v"].shape
    torch.testing.assert_close(m(inputs()).logits, y)
    with pytest.raises(PeftcError, match="`ask` is not what training"):
        m.base_model.take_saved_form("default", ask="anything")


def test_a_constant_is_there_after_a_hollow_start_and_follows_a_swap(tmp_path: Path) -> None:
    m = train(model(), last=1)
    m.save_pretrained(tmp_path)
    hollow = get_peft_model(Scored(), config(), low_cpu_mem_usage=True)
    assert not hollow.get_base_model().first.count["default"].is_meta
    swapped = model()
    with torch.no_grad():
        swapped.get_base_model().first.count["default"].fill_(7)
    hotswap_adapter(swapped, tmp_path, "default")
    assert swapped.get_base_model().first.count["default"].item() == FULL
    torch.testing.assert_close(swapped.eval()(inputs()).logits, m.eval()(inputs()).logits)


# diagnostics ----------------------------------------------------------------------------------------------------------


def train_untold(count: int) -> None:
    m = model()
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    for _ in range(count):
        backward(m)
        optimizer.step()
        optimizer.zero_grad()


def no_gradients() -> None:
    take_step(train(model(), last=1), 2)


def step_while_merged() -> None:
    m = model()
    backward(m)
    m.merge_adapter()
    take_step(m, 1)


def ask(what: str) -> None:
    m = model(ask=what)
    backward(m)
    take_step(m, 1)


CASES: dict[str, tuple[Rule, Any, str, str, str]] = {
    "training without steps": (
        rules.STEPS_MISSED,
        lambda: train_untold(5),
        "if state.untold >= _PATIENCE:",
        "if False:",
        "`default` (SHRINK) trains, but no step was told to it",
    ),
    "a step without gradients": (
        rules.STEP_WITHOUT_GRADIENTS,
        no_gradients,
        "if not any(p.grad is not None",
        "if False and any(p.grad is not None",
        "No tensor of `default` has a gradient at step 2",
    ),
    "a step of a plain method": (
        rules.NO_STEPS,
        lambda: take_step(get_peft_model(Net(), narrow()), 1),
        "if not names:",
        "if False:",
        "No adapter that trains",
    ),
    "a step while merged": (
        rules.WHILE_MERGED,
        step_while_merged,
        "session.refuse_merged(name)",
        "pass",
        "`default` is merged",
    ),
    "a training that is too short": (
        rules.SCHEDULE,
        lambda: _raise(steps.schedule_problems(model().session, 2)),
        "yield from tuner.schedule(",
        "yield from () and tuner.schedule(",
        "Too short",
    ),
    **{
        what: (rules.PLUGIN_INVALID, lambda what=what: ask(what), "    if wrong:", "    if False:", says)
        for what, says in {
            "a slot that is not there": "there is no slot ('first', 'shrink_w')",
            "a mask of numbers": "the mask of ('first', 'shrink_b') is (8,) torch.float32",
            "a mask of another shape": "is (2,) torch.bool, the slot (8,)",
            "training what is frozen": "('first', 'count') is declared as frozen",
            "another option": "`target_modules` is not among its `step_options`",
        }.items()
    },
    "a value of another type": (
        rules.BAD_VALUE,
        lambda: ask("a value of another type"),
        ".revalidated()",
        "",
        '`left` cannot be `"all"`',
    ),
}


def _raise(problems: Iterable[Diagnostic]) -> None:
    found = tuple(problems)
    if found:
        raise PeftcError(found)


@pytest.mark.parametrize("name", CASES)
def test_what_is_told(name: str) -> None:
    rule, action, _, _, says = CASES[name]
    (problem,) = told(action)
    assert (problem.code, problem.severity) == (rule.code, rule.severity)
    assert says in problem.what


@pytest.mark.parametrize("name", CASES)
def test_a_defect_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, before, after, _ = CASES[name]
    put_defect(monkeypatch, steps, before, after)
    with pytest.raises((AssertionError, LookupError, RuntimeError, TypeError, ValueError, StopIteration)):
        test_what_is_told(name)


def test_a_training_that_is_told_of_its_steps_is_not_warned_of() -> None:
    assert told(lambda: train(model(), last=5)) == []
    assert told(lambda: train_untold(2)) == [], "one step may be a trial"


def test_a_refused_step_changes_nothing() -> None:
    m = model(ask="another option")
    backward(m)
    before = tensors(m)
    with pytest.raises(PeftcError):
        take_step(m, 1)
    assert all(torch.equal(a, before[name]) for name, a in tensors(m).items())
