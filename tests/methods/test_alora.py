"""aLoRA, beside the reference: where the invocation is, in calls of every kind, and files both ways."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from peftc import LoraConfig, PeftcError, PeftcWarning, PeftModel, get_peft_model, rules
from peftc.testing.models import MODELS

LANGUAGE_MODEL = next(model for model in MODELS if model.is_language_model)
OPTIONS: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "init_lora_weights": False,
}
INVOCATION = [7, 9]
IDS = torch.tensor([[3, 7, 9, 4, 5, 6], [7, 9, 3, 7, 9, 6], [1, 2, 3, 4, 7, 9], [7, 1, 9, 3, 4, 5], [9, 7, 9, 4, 5, 7]])


def pair(**options: Any) -> tuple[PeftModel, Any]:
    torch.manual_seed(0)
    base = LANGUAGE_MODEL.build()
    made = []
    for library, config in ((get_peft_model, LoraConfig), (peft.get_peft_model, peft.LoraConfig)):
        torch.manual_seed(1)
        own = config(**{**OPTIONS, "alora_invocation_tokens": INVOCATION, **options})
        made.append(library(copy.deepcopy(base), own).eval())
    return made[0], made[1]


CALLS: dict[str, dict[str, Any]] = {
    "ids": {"input_ids": IDS},
    "offsets": {"input_ids": IDS, "alora_offsets": [4, None, 6, 2, 9]},
    "offsets of embeddings": {"alora_offsets": [4, None, 6, 2, 9]},
    "one token": {"input_ids": IDS[:, :1]},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_is_the_references(call: dict[str, Any]) -> None:
    ours, theirs = pair()
    if "input_ids" not in call:
        call = {**call, "inputs_embeds": ours.get_base_model().get_input_embeddings()(IDS).detach()}
    torch.testing.assert_close(ours(**call).logits, theirs(**call).logits)


def test_gradients_are_the_references() -> None:
    found = []
    for model in pair():
        model(IDS).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name])


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_the_references(beams: int) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": 511}
    if beams == 1:
        ours, theirs = (model.generate(input_ids=IDS, **options) for model in pair())
        assert ours.tolist() == theirs.tolist()
    else:  # with beams the reference takes rows for each other's
        model = pair()[0]
        alone = torch.cat([model.generate(input_ids=row.unsqueeze(0), **options) for row in IDS])
        assert model.generate(input_ids=IDS, **options).tolist() == alone.tolist()


def test_rows_are_the_references() -> None:
    def called(model: Any, config: Any) -> Tensor:
        torch.manual_seed(2)
        model.add_adapter("plain", config(**OPTIONS))
        torch.manual_seed(3)
        model.add_adapter("other", config(**OPTIONS, alora_invocation_tokens=[3]))
        names = ["default", "plain", "other", "__base__", "default"]
        found: Tensor = model.eval()(input_ids=IDS, adapter_names=names).logits
        return found

    ours, theirs = pair()
    torch.testing.assert_close(called(ours, LoraConfig), called(theirs, peft.LoraConfig))


def test_files_go_both_ways(tmp_path: Path) -> None:
    ours, theirs = pair()
    torch.manual_seed(0)
    base = LANGUAGE_MODEL.build()
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    here = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    there = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    wanted = theirs(input_ids=IDS).logits
    torch.testing.assert_close(here(IDS).logits, wanted)
    torch.testing.assert_close(there(input_ids=IDS).logits, wanted)


def test_it_is_not_merged() -> None:
    with pytest.raises(PeftcError, match=rules.CANNOT_MERGE.code):
        pair()[0].merge_and_unload()


def told(**options: Any) -> str:
    config = LoraConfig(**{**OPTIONS, "alora_invocation_tokens": INVOCATION, **options})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", PeftcWarning)
        try:
            get_peft_model(LANGUAGE_MODEL.build(), config)
        except PeftcError as error:
            return str(error)
    return "\n".join(str(warning.message) for warning in warned)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alora_invocation_tokens": [3, -1]}, "has the id -1, which no token has"),
        ({"task_type": None}, "`task_type` is not, not CAUSAL_LM"),
        ({"task_type": "SEQ_CLS"}, "`task_type` is SEQ_CLS, not CAUSAL_LM"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_told(options: dict[str, Any], text: str) -> None:
    assert text in told(**options)
