"""Options that a method knows of and cannot act on are refused, never ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from peftc import LoraConfig, PeftcError, PromptTuningConfig, compile_plan, get_peft_model, rules
from peftc.config.docs import describe
from peftc.runtime.snapshot import snapshot
from peftc.testing.models import MODELS

LANGUAGE_MODEL = next(model for model in MODELS if model.is_language_model)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_qalora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [0, 1]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"alora_invocation_tokens": [1]},
        {"ensure_weight_tying": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_of_the_reference_that_is_not_there_yet(options: dict[str, Any]) -> None:
    config = LoraConfig(target_modules=["0"], **options)
    with pytest.raises(PeftcError) as caught:
        compile_plan(snapshot(nn.Sequential(nn.Linear(4, 4))), {"default": config})
    assert rules.OPTION_NOT_AVAILABLE.code in [d.code for d in caught.value.diagnostics]


def test_every_option_that_is_not_available_says_so() -> None:
    from peftc_plugins.lora import NOT_YET

    told = {name for name in LoraConfig.model_fields if describe(LoraConfig, name) == "Not available yet."}
    assert told == set(NOT_YET)


def test_a_prompt_that_starts_as_a_text_needs_its_tokenizer(tmp_path: Path) -> None:
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Say what it is",
        tokenizer_name_or_path=str(tmp_path),
    )
    base = LANGUAGE_MODEL.build()
    with pytest.raises(PeftcError) as caught:
        get_peft_model(base, config)
    assert [d.code for d in caught.value.diagnostics] == [rules.TOKENIZER_MISSING.code]
    assert all(not parameter.is_meta for parameter in base.parameters())
