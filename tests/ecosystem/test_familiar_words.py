"""Phrases of the reference's errors and warnings that programs match and people search for stand in ours too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftc


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](self.first(x))


def adapted(**options: Any) -> peftc.PeftModel:
    return peftc.get_peft_model(Net(), peftc.LoraConfig(**{"target_modules": ["first"], "r": 2, **options}))


def partly_disabled() -> None:
    model = adapted(target_modules=["first", "0"])
    model.base_model.model.first.enable_adapters(False)
    with model.disable_adapter():
        pass


def both_trained_whole() -> None:
    model = adapted(modules_to_save=["0"])
    model.add_adapter("other", peftc.LoraConfig(target_modules=["first"], r=2, modules_to_save=["0"]))
    model.base_model.set_adapter(["default", "other"])


def infinite(path: str) -> Callable[[], object]:
    def merge() -> None:
        config = peftc.IA3Config(target_modules=["first"], feedforward_modules=["first"] if path == "weight" else [])
        model = peftc.get_peft_model(Net(), config)
        layer = model.base_model.model.first
        layer.get_parameter(f"base_layer.{path}").data[:] = torch.nan
        layer.ia3_l["default"].data[:] = 2
        model.merge_adapter(safe_merge=True)

    return merge


def put_on_another() -> None:
    model = Net()
    model.name_or_path = "new"  # type: ignore[assignment]
    options = peftc.LoraConfig(target_modules=["first"], r=2, base_model_name_or_path="old", revision="v1")
    peftc.get_peft_model(model, options, revision="v2")


SAID: dict[str, tuple[Callable[[], object], str]] = {
    "task": (
        lambda: peftc.LoraConfig(task_type="CAUSAL"),
        "Invalid task type: 'CAUSAL'. Must be one of the following task types: SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM,",
    ),
    "layers of a pattern": (
        lambda: peftc.LoraConfig(target_modules="a.*", layers_to_transform=[1]),
        "`layers_to_transform` cannot be used when `target_modules` is a str",
    ),
    "text without a tokenizer": (
        lambda: peftc.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"),
        "When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be None",
    ),
    "a name that is taken": (
        lambda: adapted().add_adapter("default", peftc.LoraConfig(target_modules=["first"], r=2)),
        "Adapter with name 'default' already exists",
    ),
    "targets that are not there": (
        lambda: adapted(target_modules=["frist"]),
        "Target modules `frist` not found in the base model",
    ),
    "a pattern without a target": (
        lambda: adapted(target_modules="second.*"),
        "Target modules `second.*` not found in the base model",
    ),
    "an exclusion without effect": (
        lambda: adapted(exclude_modules=["third"]),
        "You have passed exclude_modules=`third` but no modules were excluded",
    ),
    "a container trained whole": (
        lambda: adapted(modules_to_save=["blocks"]),
        "modules_to_save cannot be applied to modules of type ModuleList",
    ),
    "layers disabled one by one": (
        partly_disabled,
        "The model contains some adapter layers that are enabled and others that are disabled",
    ),
    "two that train one module whole": (
        both_trained_whole,
        "Only one adapter can be set at a time for ModulesToSaveWrapper",
    ),
    "a merged bias that is broken": (infinite("bias"), "NaNs detected in the merged bias"),
    "a merged weight that is broken": (infinite("weight"), "NaNs detected in the merged weights"),
    "a key that is not the base's": (
        lambda: peftc.set_base_model_state_dict(adapted(), {**Net().state_dict(), "stray": torch.ones(1)}),
        "Unexpected key(s) in state_dict",
    ),
    "another base": (put_on_another, "was renamed from 'old' to 'new'"),
    "another revision": (
        put_on_another,
        "peft config has already set base model revision to v1, overwriting with revision v2",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_wrong_is_said_in_the_words_that_are_known(name: str) -> None:
    run, phrase = SAID[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = ""
        try:
            run()
        except peftc.PeftcError as error:
            said = str(error)
    assert phrase in "\n".join([said, *(str(warning.message) for warning in caught)])


def test_a_revision_that_is_the_same_is_no_change() -> None:
    for known in (None, "v2"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            config = peftc.LoraConfig(target_modules=["first"], r=2, revision=known)
            assert peftc.get_peft_model(Net(), config, revision="v2").peft_config["default"].revision == "v2"
