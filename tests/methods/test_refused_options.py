"""Options that a method knows of and cannot act on are refused, never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftc import (
    AdaLoraConfig,
    LoraConfig,
    PeftcError,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    rules,
    set_peft_model_state_dict,
)
from peftc.testing.models import MODELS

LANGUAGE_MODEL = next(model for model in MODELS if model.is_language_model)


@pytest.mark.parametrize("option", ["use_dora", "use_qalora", "lora_bias"])
def test_an_option_that_is_for_another_method_is_refused(option: str) -> None:
    with pytest.raises(PeftcError) as caught:
        AdaLoraConfig(target_modules=["0"], total_step=10, **{option: True})
    assert rules.OPTION_NOT_AVAILABLE.code in [d.code for d in caught.value.diagnostics]


def stacked() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def trained(folder: Path, **options: Any) -> torch.Tensor:
    """A saved adapter whose config says these options, as a release that has them wrote it; its output for ones."""
    model = get_peft_model(stacked(), LoraConfig(target_modules=["0", "1"], r=2, init_lora_weights=False))
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return model(torch.ones(1, 4)).detach()


STARTS = [{"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, {"init_lora_weights": "orthogonal"}]


@pytest.mark.parametrize("options", STARTS, ids=lambda options: options["init_lora_weights"])
def test_how_a_trained_adapter_started_is_kept_and_does_not_matter(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = trained(tmp_path, **options)
    model = PeftModel.from_pretrained(stacked(), tmp_path)
    torch.testing.assert_close(model(torch.ones(1, 4)), expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["init_lora_weights"] == options["init_lora_weights"]
    assert (again["eva_config"] or {}).get("rho") == options.get("eva_config", {}).get("rho")
    injected = inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path), stacked())
    set_peft_model_state_dict(injected, load_peft_weights(tmp_path))
    torch.testing.assert_close(injected(torch.ones(1, 4)), expected, rtol=0, atol=0)


def test_a_start_is_judged_where_part_of_the_adapter_would_start(tmp_path: Path) -> None:
    trained(tmp_path, init_lora_weights="from next year")
    base = stacked()
    with pytest.raises(PeftcError, match=rules.START_UNKNOWN.code):
        PeftModel.from_pretrained(base, tmp_path)
    assert type(base[0]) is nn.Linear


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga"])
def test_a_start_that_changed_the_base_is_refused_of_trained_adapters_where_it_cannot_be_repeated(
    tmp_path: Path, start: str
) -> None:
    trained(tmp_path, init_lora_weights=start)
    with pytest.raises(PeftcError):
        PeftModel.from_pretrained(stacked(), tmp_path)


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
