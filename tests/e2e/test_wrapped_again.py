"""The base of a prompt model, which no prompt changes, is an ordinary base for further models; both go on working."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peftc import LoraConfig, PeftcError, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model, rules
from peftc.testing.models import MODELS

LANGUAGE_MODEL = next(model for model in MODELS if model.is_language_model)
X = torch.arange(2, 8)[None]


def prompts(rows: int = 3) -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=X).logits
    return found


def test_two_prompt_models_share_a_base_and_each_goes_on() -> None:
    base = LANGUAGE_MODEL.build()
    first = get_peft_model(base, prompts())
    before = logits(first)
    second = get_peft_model(first.get_base_model(), prompts(5))
    second.add_adapter("more", prompts(2))
    first.add_adapter("more", prompts(4))
    assert [len(model.prompt_encoder["more"].embedding.weight) for model in (first, second)] == [4, 2]
    assert set(first.peft_config) == set(second.peft_config) == {"default", "more"}
    torch.testing.assert_close(logits(first), before, rtol=0, atol=0)
    first.set_adapter("more")
    second.set_adapter("more")
    assert not torch.equal(logits(first), logits(second))


def test_the_base_of_a_prompt_model_takes_saved_adapters(tmp_path: Path) -> None:
    base = LANGUAGE_MODEL.build()
    saved = get_peft_model(LANGUAGE_MODEL.build(), lora())
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(get_peft_model(base, prompts()).get_base_model(), tmp_path)
    torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=0)
    other = LANGUAGE_MODEL.build()
    inject_adapter_in_model(lora(), get_peft_model(other, prompts()).get_base_model())


def test_what_a_base_has_in_it_keeps_others_away() -> None:
    base = LANGUAGE_MODEL.build()
    first = get_peft_model(base, prompts())
    adapted = get_peft_model(base, lora())
    with pytest.raises(PeftcError, match=rules.MIXED_TYPES.code):
        first.add_adapter("more", prompts())
    with pytest.raises(PeftcError, match=rules.MIXED_TYPES.code):
        get_peft_model(adapted.get_base_model(), prompts())
    adapted.unload()
    first.add_adapter("more", prompts())
