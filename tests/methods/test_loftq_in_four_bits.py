"""`replace_lora_weights_loftq` on a base that was loaded in four bits: the adapted model is nearer to the one before quantising."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peftc import get_peft_config, get_peft_model, replace_lora_weights_loftq
from tests.bases.made import BASES, IDS, float_folder

FOUR_BITS = [name for name in BASES if name.startswith("bitsandbytes") and "4" in name]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.train()(input_ids=IDS).logits.float()
    return found


@pytest.mark.parametrize("name", FOUR_BITS)
def test_what_quantising_lost_is_in_the_factors(name: str, tmp_path: Path) -> None:
    wanted = logits(AutoModelForCausalLM.from_pretrained(float_folder()))
    base = BASES[name].made(tmp_path)
    lost = (logits(base) - wanted).norm()
    model = get_peft_model(
        base,
        get_peft_config({"peft_type": "LORA", "r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    )
    assert torch.equal(logits(model), logits(base))
    replace_lora_weights_loftq(model, model_path=str(float_folder() / "model.safetensors"))
    assert (logits(model) - wanted).norm() < 0.9 * lost


def test_there_are_such_bases() -> None:
    assert FOUR_BITS
