"""`ensure_weight_tying` of LoRA: copies, adapters and rows of tied embeddings stay one, beside the reference."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftc import AdaLoraConfig, LoraConfig, PeftcError, PeftcWarning, PeftModel, compile_plan, get_peft_model
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.model.functions.hotswap import hotswap_adapter_from_state_dict
from peftc.runtime.applying.snapshot import snapshot
from tests.methods.exchange import move
from tests.methods.small_llama import IDS, llama, logits

#: What is asked for, and whether it is the weight itself that trains.
ASKED: dict[str, dict[str, Any]] = {
    "target embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "target head": {"target_modules": ["q_proj", "lm_head"]},
    "target both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "target pattern": {"target_modules": ".*(lm_head|q_proj)"},
    "save embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "save head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "save head, target embedding": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "save embedding, target head": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]},
    "rows of both": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [2], "lm_head": [2]}},
}


def options(asked: str, **more: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 4, "ensure_weight_tying": True, **ASKED[asked], **more}


@pytest.mark.parametrize("asked", ASKED)
def test_uses_of_a_weight_stay_one_in_every_state(asked: str) -> None:
    plan = compile_plan(snapshot(llama()), {"default": LoraConfig(**options(asked))})
    left = {"PC408"} if "save" in asked and "target" in asked else set()  # a target of what is trained whole
    assert {warning.code for warning in plan.warnings} == left
    again = plan_from_json(plan_to_json(plan))
    assert plan_to_json(again)["adapters"] == plan_to_json(plan)["adapters"]
    model = get_peft_model(llama(), LoraConfig(**options(asked)))
    assert plan.counts() == model.get_nb_trainable_parameters()
    assert {p.name for p in plan.parameters()} == {n for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(logits(model), logits(llama()))
    move(model)
    y = logits(model)
    torch.testing.assert_close(logits(copy.deepcopy(model)), y)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), y, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("asked", ASKED)
def test_gradients_are_those_of_the_tied_matrix(asked: str) -> None:
    """What one tensor gets is what its uses get together."""
    model = get_peft_model(llama(), LoraConfig(**options(asked)))
    move(model)
    logits(model).square().sum().backward()
    merged = copy.deepcopy(model).merge_and_unload()
    merged.zero_grad()
    merged.requires_grad_(True)
    logits(merged).square().sum().backward()
    whole = merged.model.embed_tokens.weight.grad
    own = {n.rpartition("embed_tokens.")[2]: p for n, p in model.named_parameters() if p.requires_grad and "embed" in n}
    if "lora_embedding_A.default" in own:
        A, B = own["lora_embedding_A.default"], own["lora_embedding_B.default"]
        expected = {"A": 2 * (whole @ B.detach()).T, "B": 2 * (A.detach() @ whole).T}
        torch.testing.assert_close(A.grad, expected["A"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(B.grad, expected["B"], rtol=1e-3, atol=1e-3)
    elif "modules_to_save.default.weight" in own:
        torch.testing.assert_close(own["modules_to_save.default.weight"].grad, whole, rtol=1e-3, atol=1e-3)
    else:
        (rows,) = own.values()
        ids = [2] if asked == "rows of both" else [3, 1]
        torch.testing.assert_close(rows.grad, whole[ids], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("asked", [asked for asked in ASKED if asked != "save embedding, target head"])
def test_both_libraries_read_each_others_files(asked: str, tmp_path: Path) -> None:
    ours = get_peft_model(llama(), LoraConfig(**options(asked)))
    move(ours)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "ours")), logits(ours))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(ours))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    ours_of = [str(w.message) for w in told if isinstance(w.message, PeftcWarning)]
    assert all("PC408" in text and asked == "save head, target embedding" for text in ours_of)
    torch.testing.assert_close(logits(again), logits(ours))
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_in_half_precision_copies_train_in_float32_and_stay_one() -> None:
    model = get_peft_model(llama(dtype=torch.bfloat16), LoraConfig(**options("save head")))
    move(model)
    (first, second) = (m.modules_to_save["default"].weight for m in (model.get_input_embeddings(), model.lm_head))
    assert first is second and first.dtype is torch.float32
    y = logits(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.lm_head.weight.dtype is torch.bfloat16
    torch.testing.assert_close(logits(merged), y, rtol=0.1, atol=0.5)


def test_two_adapters_and_rows_of_a_batch() -> None:
    model = get_peft_model(llama(), LoraConfig(**options("target head")), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("three", LoraConfig(**options("target embedding", r=3)))
    found = {}
    for name in ("one", "two", "three"):
        model.set_adapter(name)
        move(model, sum(name.encode()))
        found[name] = logits(model)
    y = model(input_ids=IDS, adapter_names=["one", "three"]).logits
    torch.testing.assert_close(y, torch.stack([found["one"][0], found["three"][1]]), rtol=1e-4, atol=1e-4)
    model.delete_adapter("one")
    torch.testing.assert_close(logits(model), found["three"])
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_adapters_are_combined_and_swapped_as_one() -> None:
    model = get_peft_model(llama(), LoraConfig(**options("target head")), "one")
    model.add_adapter("two", LoraConfig(**options("target head")))
    for name in ("one", "two"):
        model.set_adapter(name)
        move(model, sum(name.encode()))
    y = logits(model)
    model.add_weighted_adapter(["one", "two"], [0.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-4)
    other = get_peft_model(llama(), LoraConfig(**options("target head")))
    given = {key: t.detach() for key, t in model.adapter_tensors("two").items() if "base_layer" not in key}
    hotswap_adapter_from_state_dict(other, given, "default", LoraConfig(**options("target head")))
    torch.testing.assert_close(logits(other), y)


@pytest.mark.parametrize(
    ("tied", "asked", "says"),
    [
        (False, "target embedding", "no tied modules were found in the model"),
        (False, "save head", "no tied modules were found in the model"),
        (False, "rows", "no tied modules were found in the model"),
        (True, "nothing", "no tied modules are added in"),
    ],
)
def test_nothing_tied_is_no_effect(tied: bool, asked: str, says: str) -> None:
    given = {**options("rows"), "trainable_token_indices": None} if asked == "nothing" else options(asked)
    with pytest.warns(PeftcWarning, match=f"PC458.*{says}"):
        model = get_peft_model(llama(tied), LoraConfig(**given))
    plain = get_peft_model(llama(tied), LoraConfig(**{**given, "ensure_weight_tying": False}))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}


def test_rows_that_differ_cannot_be_tied() -> None:
    rows = {"embed_tokens": [1], "lm_head": [2]}
    with pytest.raises(PeftcError, match=r"PC118.*Cannot ensure weight tying"):
        get_peft_model(llama(), LoraConfig(**options("rows", trainable_token_indices=rows)))


def test_what_has_no_transpose_is_told() -> None:
    asked = AdaLoraConfig(target_modules=["embed_tokens"], total_step=9, ensure_weight_tying=True)
    with pytest.raises(PeftcError, match=r"PC401.*cannot be done the other way round"):
        get_peft_model(llama(), asked)


def test_a_file_with_one_of_the_names_is_read(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(**options("save head")))
    move(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
