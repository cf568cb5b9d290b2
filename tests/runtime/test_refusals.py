"""What a live model refuses, or warns of, and that it is unchanged afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, PeftcWarning, PeftModel, compile_plan, get_peft_model, inject_adapter_in_model, rules
from peftc.config.base import PeftConfig
from peftc.diagnostics import Rule
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import apply_plan
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.models import MODELS
from peftc.tuner.prompt import Place, PromptTuner

METHODS = [default_registry().get(name) for name in default_registry().names]
ON_LAYERS = next(method for method in METHODS if method.adapts_layers)
PROMPT = next(m for m in METHODS if isinstance(m.tuner, PromptTuner) and m.tuner.place is Place.INPUT)
LANGUAGE_MODEL = next(model for model in MODELS if model.is_language_model)


class Two(nn.Module):
    """Two square layers; `(batch, 8)` to `(batch, 8)`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def on_layers() -> PeftConfig:
    return ON_LAYERS.config(**{**dict(ON_LAYERS.examples[0]), "target_modules": ["first"]})


def prompt(**options: Any) -> PeftConfig:
    return PROMPT.config(task_type="CAUSAL_LM", **PROMPT.examples[0], **options)


@pytest.fixture
def model() -> PeftModel:
    return get_peft_model(Two(), on_layers())


@pytest.fixture
def prompted() -> PeftModel:
    return get_peft_model(LANGUAGE_MODEL.build(), prompt())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(rule: Rule, model: nn.Module, action: Callable[[], Any]) -> None:
    """The action raises this kind of diagnostic, and the model is what it was."""
    before = state(model)
    with pytest.raises(PeftcError) as caught:
        action()
    assert {d.code for d in caught.value.diagnostics} == {rule.code}
    after = state(model)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_second_adapter_of_one_name(model: PeftModel) -> None:
    refused(rules.ADAPTER_EXISTS, model, lambda: model.add_adapter("default", on_layers()))


@pytest.mark.parametrize("action", ["set_adapter", "delete_adapter"])
def test_an_adapter_that_is_not_there(model: PeftModel, action: str) -> None:
    refused(rules.ADAPTER_UNKNOWN, model, lambda: getattr(model, action)("nobody"))


def test_a_plan_of_another_model() -> None:
    other = Two(width=6)
    plan = compile_plan(snapshot(Two()), {"default": on_layers()})
    refused(rules.MODEL_DRIFTED, other, lambda: apply_plan(other, plan))


def test_a_plan_of_a_model_with_other_layers() -> None:
    other = nn.Sequential(nn.Linear(8, 8))
    plan = compile_plan(snapshot(Two()), {"default": on_layers()})
    refused(rules.MODEL_DRIFTED, other, lambda: apply_plan(other, plan))


def test_a_safe_merge_that_is_not_finite(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    before = model.get_base_model().first.base_layer.weight.clone()
    with pytest.raises(PeftcError) as caught:
        model.merge_adapter(safe_merge=True)
    assert [d.code for d in caught.value.diagnostics] == [rules.MERGE_NOT_FINITE.code]
    assert torch.equal(model.get_base_model().first.base_layer.weight, before)


def test_merging_twice(model: PeftModel) -> None:
    model.merge_adapter()
    before = state(model)
    with pytest.warns(PeftcWarning, match=rules.ALREADY_MERGED.code):
        model.merge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


def test_deleting_a_merged_adapter(model: PeftModel) -> None:
    model.add_adapter("other", on_layers())
    model.merge_adapter()
    refused(rules.WHILE_MERGED, model, lambda: model.delete_adapter("default"))


def test_a_model_that_was_unloaded(model: PeftModel) -> None:
    base = model.unload()
    refused(rules.NOT_ADAPTED, base, model.merge_adapter)


def test_a_prompt_without_a_wrapper_for_the_call() -> None:
    base = LANGUAGE_MODEL.build()
    refused(rules.CALL_NOT_POSSIBLE, base, lambda: inject_adapter_in_model(prompt(), base))


def test_a_prompted_call_without_input(prompted: PeftModel) -> None:
    refused(rules.CALL_NOT_POSSIBLE, prompted, lambda: prompted(attention_mask=torch.ones(1, 2)))


def test_a_prompted_call_with_positions(prompted: PeftModel) -> None:
    ids = torch.tensor([[1, 2]])
    with pytest.warns(PeftcWarning, match=rules.POSITIONS_IGNORED.code):
        moved = prompted(input_ids=ids, position_ids=torch.tensor([[5, 6]]))
    assert torch.equal(moved.logits, prompted(input_ids=ids).logits)
