"""Rows of embeddings that train beside LoRA (`trainable_token_indices`): in every state, on tied and untied heads, beside the
reference, whose files are read and which reads ours."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import peftc
from peftc import LoraConfig, PeftcError, PeftcWarning, PeftModel, compile_plan, convert_adapter, get_peft_model
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.model.functions.hotswap import hotswap_adapter_from_state_dict
from peftc.runtime.applying.snapshot import snapshot
from tests.methods.exchange import move
from tests.methods.small_llama import IDS, llama, logits

ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


def options(rows: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "r": 2,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 1, 5] if rows is None else rows,
        **more,
    }


def config(rows: Any = None, **more: Any) -> LoraConfig:
    return LoraConfig(**options(rows, **more))


NAMED = {"embed_tokens": [3, 1], "lm_head": [7, 2, 5]}


def test_what_is_planned_is_what_the_model_has() -> None:
    """Names, shapes and counts, and the plan's JSON."""
    for more in ({}, {"target_modules": ["q_proj", "embed_tokens"]}, {"rows": NAMED}):
        plan = compile_plan(snapshot(llama(False)), {"default": config(**more)})
        model = get_peft_model(llama(False), config(**more))
        found = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        assert {p.name: p.shape for p in plan.parameters()} == found
        assert plan.counts() == model.get_nb_trainable_parameters()
        again = plan_from_json(plan_to_json(plan))
        assert list(again.parameters()) == list(plan.parameters())
        assert plan_to_json(again)["adapters"] == plan_to_json(plan)["adapters"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_take_the_place_of_the_bases_own(tied: bool, dtype: torch.dtype) -> None:
    model, expected = (
        get_peft_model(llama(tied, dtype), config()),
        get_peft_model(llama(tied, dtype), LoraConfig(r=2, target_modules=["q_proj"])),
    )
    torch.testing.assert_close(logits(model), logits(expected))
    move(model)
    tensors = model.adapter_tensors("default")
    rows = tensors.pop(ROWS)
    with torch.no_grad():
        expected.base_model.model.model.embed_tokens.weight[[3, 1, 5]] = rows.to(dtype)
        for key, tensor in expected.adapter_tensors("default").items():
            tensor.copy_(tensors[key])
    y = logits(model)
    torch.testing.assert_close(y, logits(expected))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(tied, dtype)))
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    base = model.merge_and_unload()
    assert torch.equal(logits(base), merged)
    assert torch.equal(base.model.embed_tokens.weight[[3, 1, 5]], rows.to(dtype))
    assert (base.lm_head.weight is base.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [[3, 1, 5], {"embed_tokens": [3, 1]}, {"lm_head": [2]}, NAMED], ids=str)
def test_both_libraries_compute_the_same_and_read_each_others_files(tied: bool, rows: Any, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(tied), peft.LoraConfig(**options(rows)))
    move(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = PeftModel.from_pretrained(llama(tied), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(logits(ours), logits(theirs))
    grads = []
    for model in (ours, theirs):
        logits(model).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(tied), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs))
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_a_tied_head_has_the_same_rows_once(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    assert list(model.adapter_tensors("default"))[-1:] == [ROWS]
    assert HEAD not in model.adapter_tensors("default")
    inside = [module.token_adapter for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    tables = [room.trainable_tokens_delta["default"] for room in inside]
    assert tables[0] is tables[1]
    model.delete_adapter("default")
    assert model.unload().lm_head.weight is model.get_base_model().model.embed_tokens.weight


def test_tables_of_an_encoder_and_a_decoder_are_one(tmp_path: Path) -> None:
    def t5() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()

    def y(model: nn.Module) -> Tensor:
        return model(input_ids=IDS, decoder_input_ids=IDS).logits

    theirs = peft.get_peft_model(t5(), peft.LoraConfig(**options(target_modules=["q"])))
    move(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = PeftModel.from_pretrained(t5(), tmp_path)
    torch.testing.assert_close(y(ours), y(theirs))
    ours.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(y(peft.PeftModel.from_pretrained(t5(), tmp_path / "ours")), y(theirs))


@pytest.mark.parametrize("first", ["rows", "factors"])
def test_an_embedding_that_is_a_target_too_has_its_update_beside_the_rows(first: str, tmp_path: Path) -> None:
    """`y = W'[x] + s B A[x]`, whichever adapter came first. The reference cannot compute it."""
    both = config(target_modules=["embed_tokens"], lora_alpha=4)
    other = config(target_modules=["q_proj"]) if first == "rows" else LoraConfig(r=2, target_modules=["embed_tokens"])
    model = get_peft_model(llama(False), other, "other")
    model.add_adapter("default", both)
    model.set_adapter("default")
    move(model)
    own = {key.rpartition("embed_tokens.")[2]: tensor for key, tensor in model.adapter_tensors("default").items()}
    expected = llama(False)
    with torch.no_grad():
        weight = expected.model.embed_tokens.weight
        weight[[3, 1, 5]] = own["token_adapter.trainable_tokens_delta"]
        weight += 2 * (own["lora_embedding_B"] @ own["lora_embedding_A"]).T
    y = logits(expected)
    torch.testing.assert_close(logits(model), y)
    depth = model.session.layers["model.embed_tokens"].chain()
    assert [layer.spot for layer in depth] == ["token_adapter", ""]
    names = {p.name for p in model.session.plans["default"].parameters()}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, save_embedding_layers=False, selected_adapters=["default"])
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(False), tmp_path)), y)
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model), y)
    torch.testing.assert_close(logits(model.merge_and_unload()), y)


def test_adapters_with_other_tokens_act_together_and_with_the_same_ones_not() -> None:
    model = get_peft_model(llama(), config([1, 2]), "one")
    model.add_adapter("two", config([3, 4]))
    model.add_adapter("three", config([4, 5]))
    model.add_adapter("none", LoraConfig(r=2, target_modules=["q_proj"]))
    for name in ("one", "two", "three", "none"):
        model.set_adapter(name)
        move(model, sum(name.encode()))
    model.base_model.set_adapter(["one", "two", "none"])
    y = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y)
    model.unmerge_adapter()
    with pytest.raises(PeftcError, match=r"PC431.*both train the token 4"):
        model.base_model.set_adapter(["two", "three"])
    assert model.active_adapters == ["one", "two", "none"]
    with pytest.raises(PeftcError, match="PC431"):
        compile_plan(snapshot(llama()), {"a": config([1]), "b": config([1])}, active=["a", "b"])


def test_each_row_of_a_batch_has_its_adapter() -> None:
    model = get_peft_model(llama(), config([3]), "one")
    model.add_adapter("two", config([3, 4]))
    model.add_adapter("none", LoraConfig(r=2, target_modules=["q_proj"]))
    found = {}
    for name in ("one", "two", "none"):
        model.set_adapter(name)
        move(model, sum(name.encode()))
        found[name] = logits(model)
    found["__base__"] = logits(llama())
    for names in (["one", "two"], ["none", "one"], ["two", "__base__"]):
        expected = torch.stack([found[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(logits(model, adapter_names=names), expected)


def test_copies_and_pickles_have_rows_of_their_own() -> None:
    model = get_peft_model(llama(), config())
    move(model)
    y = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), y)
        move(twin, 5)
        assert not torch.equal(logits(twin), y)
        assert torch.equal(logits(model), y)
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_values_are_swapped_in_place() -> None:
    model, other = (get_peft_model(llama(), config(rows)) for rows in ([3, 1, 5], [7, 2, 4]))
    move(other, 4)
    given = {key: tensor.detach() for key, tensor in other.adapter_tensors("default").items()}
    hotswap_adapter_from_state_dict(model, given, "default", config([7, 2, 4]))
    torch.testing.assert_close(logits(model), logits(other))


REFUSED = [
    ({"rows": [3, 30]}, "PC401", "has 30 rows, but `trainable_token_indices` names 30"),
    ({"rows": [1, 2, 1]}, "PC102", "names 1 twice"),
    ({"rows": {"embed": [1]}}, "PC455", "No module is called `embed`"),
    ({"rows": {"layernorm": [1]}}, "PC401", "which has no rows for tokens"),
    ({"rows": {"embed_tokens": [1], "nowhere": []}}, "PC455", "No module is called `nowhere`"),
    ({"modules_to_save": ["embed_tokens"]}, "PC118", "already marked to be trained fully"),
    ({"modules_to_save": ["model"]}, "PC118", "already marked to be trained fully"),
]


@pytest.mark.parametrize(
    ("more", "code", "says"), REFUSED, ids=[f"{i}-{code}" for i, (_, code, _) in enumerate(REFUSED)]
)
def test_what_cannot_be_is_refused_with_nothing_changed(more: dict[str, Any], code: str, says: str) -> None:
    base = llama(False)
    with pytest.raises(PeftcError, match=says) as caught:
        get_peft_model(base, config(**more))
    assert code in {told.code for told in caught.value.diagnostics}
    assert torch.equal(logits(base), logits(llama(False)))
    assert all(told.where.path for told in caught.value.diagnostics)


def test_ids_below_zero_are_refused_before_there_is_a_model() -> None:
    with pytest.raises(PeftcError, match=r"trainable_token_indices\[1\].*`-1`"):
        config([1, -1])
    with pytest.raises(PeftcError, match="trainable_token_indices"):
        config({"embed_tokens": [-2]})


@pytest.mark.parametrize("rows", [[], {}, {"embed_tokens": []}], ids=str)
def test_no_token_is_no_effect(rows: Any) -> None:
    with pytest.warns(PeftcWarning, match="PC456"):
        model = get_peft_model(llama(), config(rows))
    assert not model.session.layers.get("model.embed_tokens")


def test_what_rows_cannot_be_is_told() -> None:
    model = get_peft_model(llama(), config(), "one")
    model.add_adapter("two", config([2]))
    with pytest.raises(PeftcError, match=r"PC5.*do not add up"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    with pytest.raises(PeftcError, match="no change of low rank"):
        convert_adapter(model, "LORA", 2, "one")


def test_biases_of_a_head_with_rows_train_under_their_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    for targets in (["body"], ["body", "head"]):
        torch.manual_seed(0)
        asked = LoraConfig(r=2, target_modules=targets, bias="all", trainable_token_indices={"head": [2, 8]})
        model = get_peft_model(Net(), asked)
        names = {p.name for p in model.session.plans["default"].parameters()}
        assert names == {name for name, p in model.named_parameters() if p.requires_grad}
        x = torch.randn(3, 4)
        move(model)
        y = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_travels_with_the_rows(tied: bool, tmp_path: Path) -> None:
    """Under the names that the reference has for it, both ways."""

    def resized(fill: float) -> nn.Module:
        model = llama(tied)
        torch.manual_seed(0)
        model.resize_token_embeddings(32)
        with torch.no_grad():
            for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
                matrix[30:] = fill
        return model

    for writer, cls in ((peft, peft.LoraConfig), (peftc, LoraConfig)):
        made = writer.get_peft_model(resized(0.5), cls(**options()))
        made.save_pretrained(tmp_path / writer.__name__, save_embedding_layers=True)
        for reader in (peft, peftc):
            loaded = reader.PeftModel.from_pretrained(resized(7.0), tmp_path / writer.__name__)
            torch.testing.assert_close(logits(loaded.eval()), logits(made.eval()))
