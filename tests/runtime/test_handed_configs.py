"""The config that a model shows is the object that was handed over, filled in; what layers compute by is not."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftc import PeftModel, get_peft_model, inject_adapter_in_model
from peftc.config.base import PeftConfig
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import session_of
from tests.runtime.methods import LANGUAGE_MODEL, Net, narrow, preface, stretch, x


def loaded(config: PeftConfig, base: nn.Module, folder: Path) -> PeftConfig:
    get_peft_model(deepcopy(base), deepcopy(config)).save_pretrained(folder)
    return PeftModel.from_pretrained(base, folder, config=config).peft_config["default"]


def added(config: PeftConfig, base: nn.Module, folder: Path) -> PeftConfig:
    model = get_peft_model(base, deepcopy(config))
    model.add_adapter("other", config)
    return model.peft_config["other"]


WAYS: dict[str, Callable[[PeftConfig, nn.Module, Path], PeftConfig]] = {
    "wrapped": lambda config, base, folder: get_peft_model(base, config).peft_config["default"],
    "added": added,
    "loaded": loaded,
    "injected": lambda config, base, folder: inject_adapter_in_model(config, base).peft_config["default"],
}
CONFIGS = {
    "a thin one": (narrow, Net),
    "a full one": (stretch, Net),
    "a prompt": (lambda: preface(task_type="CAUSAL_LM"), LANGUAGE_MODEL.build),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_the_object_that_was_handed_over(kind: str, way: str, tmp_path: Path) -> None:
    make, base = CONFIGS[kind]
    config = make()
    if config.is_prompt_learning and way == "injected":
        pytest.skip("prompts are not injected")
    assert WAYS[way](config, base(), tmp_path) is config


def without_targets() -> PeftConfig:
    """Options of a method that has targets of its own for a language model."""
    registry = default_registry()
    tables = (method for method in map(registry.get, registry.names) if "target_modules" in method.default_targets)
    method = next(tables)
    return method.config(
        **{option: value for option, value in method.examples[0].items() if option != "target_modules"}
    )


def test_it_is_filled_in() -> None:
    config: Any = without_targets()
    assert config.target_modules is None
    model = get_peft_model(LANGUAGE_MODEL.build(), config)
    assert config.target_modules
    assert config == model.session.plans["default"].config


def test_a_failure_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("peftc.model.parts.adapted.apply_plan", fail)
    config = without_targets()
    with pytest.raises(ZeroDivisionError):
        get_peft_model(LANGUAGE_MODEL.build(), config)
    assert config == without_targets()


def test_a_later_change_is_one_of_what_is_saved_and_not_of_what_is_computed(tmp_path: Path) -> None:
    config = narrow()
    model = get_peft_model(Net(), config).eval()
    before = model(x())
    config.base_model_name_or_path = "somebody/something"
    config.r = config.r + 1
    assert torch.equal(model(x()), before)
    assert all(part.config.r == config.r - 1 for part in model.session.plans["default"].maps)
    model.save_pretrained(tmp_path)
    assert '"somebody/something"' in (tmp_path / "adapter_config.json").read_text()


def test_an_object_that_another_adapter_shows_stays_that_ones() -> None:
    config = narrow()
    model = get_peft_model(Net(), config)
    model.add_adapter("other", config)
    assert model.peft_config["default"] is config
    assert model.peft_config["other"] is not config and model.peft_config["other"] == config
    session = session_of(model.get_base_model())
    assert session is not None and session.plans["other"].config is model.peft_config["other"]
