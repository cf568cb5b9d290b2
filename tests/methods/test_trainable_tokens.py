"""Trainable tokens: rows exchanged without a copy of the matrix, tied heads, and adapters exchanged with the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3TextConfig, Gemma3TextModel

from peftc import (
    PeftcError,
    PeftcWarning,
    PeftModel,
    TrainableTokensConfig,
    compile_plan,
    get_peft_model,
    set_peft_model_state_dict,
)
from peftc.model.functions.hotswap import hotswap_adapter_from_state_dict
from peftc.runtime.applying.snapshot import snapshot
from tests.methods.exchange import move
from tests.methods.small_llama import IDS, SIZES, llama, logits

ROWS, ROWS_OF_THE_HEAD = (
    f"base_model.model.{layer}.trainable_tokens_delta" for layer in ("model.embed_tokens", "lm_head")
)


def options(indices: list[int] | None = None, **more: Any) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=[3, 1, 5] if indices is None else indices, **more)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_take_the_place_of_the_bases_own(tied: bool, dtype: torch.dtype) -> None:
    model, expected = get_peft_model(llama(tied, dtype), options()), llama(tied, dtype)
    torch.testing.assert_close(logits(model), logits(expected))
    move(model)
    rows = model.adapter_tensors("default")[ROWS]
    with torch.no_grad():
        expected.model.embed_tokens.weight[[3, 1, 5]] = rows.to(dtype)
    torch.testing.assert_close(logits(model), logits(expected))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(expected), rtol=0.0, atol=0.0)


def test_a_tied_head_has_the_same_rows_once() -> None:
    model = get_peft_model(llama(), options())
    assert sorted(site.path for site in model.session.plans["default"].maps) == ["lm_head", "model.embed_tokens"]
    assert model.get_nb_trainable_parameters()[0] == 3 * 16
    own, copy = model.adapter_tensors("default").items()
    assert (own[0], copy[0]) == (ROWS, ROWS_OF_THE_HEAD)
    assert own[1].data_ptr() == copy[1].data_ptr()
    stored = dict(model.session.plans["default"].stored(model.session.graph.model))
    assert {key: facts.shape for key, facts in stored.items()} == {ROWS: (3, 16), ROWS_OF_THE_HEAD: (3, 16)}
    assert sum(p.requires_grad for p in model.parameters()) == 1
    assert model.peft_config["default"].target_modules == "model.embed_tokens"


def test_gradients_are_those_of_the_tied_matrix() -> None:
    model, whole = get_peft_model(llama(), options()), llama()
    logits(model).square().sum().backward()
    logits(whole).square().sum().backward()
    (gradient,) = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(gradient, whole.model.embed_tokens.weight.grad[[3, 1, 5]])


class Largest(TorchDispatchMode):
    """The largest tensor of two dimensions that is made."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = ("view", "t.default", "transpose", "detach", "expand", "alias", "permute")
        if isinstance(out, Tensor) and out.dim() == 2 and not any(name in str(func) for name in views):
            self.rows = max(self.rows, out.shape[0])
        return out


def test_no_copy_of_the_matrix_is_made_in_a_call() -> None:
    model = get_peft_model(llama(), options())
    with Largest() as seen:
        logits(model).sum().backward()
    assert 0 < seen.rows < 30


def test_scaled_embeddings_scale_the_rows_too() -> None:
    torch.manual_seed(0)
    base = Gemma3TextModel(Gemma3TextConfig(**SIZES, head_dim=8)).eval()
    expected = copy.deepcopy(base)
    model = get_peft_model(base, options())
    move(model)
    rows = next(iter(model.adapter_tensors("default").values()))
    with torch.no_grad():
        expected.embed_tokens.weight[[3, 1, 5]] = rows
    torch.testing.assert_close(model(IDS).last_hidden_state, expected(IDS).last_hidden_state)


def test_a_head_with_a_bias_keeps_it() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 9)).double()
    x, weight = torch.randn(2, 3, 4).double(), base[0].weight.detach().clone()
    model = get_peft_model(base, options([8, 2], target_modules=["0"]))
    move(model)
    weight[[8, 2]] = next(iter(model.adapter_tensors("default").values())).detach()
    torch.testing.assert_close(model(x), x @ weight.T + base[0].bias)


def test_adapters_with_other_tokens_act_together_and_with_the_same_ones_not() -> None:
    model = get_peft_model(llama(), options([1, 2]), "one")
    model.add_adapter("two", options([3, 4]))
    model.add_adapter("three", options([4, 5]))
    for name in ("one", "two", "three"):
        model.set_adapter(name)
        move(model, sum(name.encode()))
    model.set_adapter(["one", "two"])
    y = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y)
    model.unmerge_adapter()
    with pytest.raises(PeftcError, match="PC431") as caught:
        model.set_adapter(["two", "three"])
    assert "both train the token 4" in str(caught.value)
    assert model.active_adapters == ["one", "two"]
    model.merge_adapter(["two"])
    with pytest.raises(PeftcError, match="PC431"):
        model.merge_adapter(["three"])
    with pytest.raises(PeftcError, match="PC431"):
        compile_plan(snapshot(llama()), {"a": options([1]), "b": options([1])}, active=["a", "b"])


def test_each_row_of_a_batch_has_its_adapter() -> None:
    model = get_peft_model(llama(), options([3]), "one")
    model.add_adapter("two", options([3, 4]))
    found = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        move(model, sum(name.encode()))
        found[name] = logits(model)
    y = logits(model, adapter_names=["one", "two"])
    torch.testing.assert_close(y, torch.stack([found["one"][0], found["two"][1]]))


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ([], "is empty"),
        ([1, 2, 1], "names 1 twice"),
        ([-1], "names -1, which no token can be"),
        ([30], "has 30 rows, but `token_indices` names 30"),
    ],
)
def test_ids_that_are_no_rows_are_refused(indices: list[int], says: str) -> None:
    with pytest.raises(PeftcError, match=says):
        get_peft_model(llama(), options(indices))


def test_a_model_that_does_not_say_what_its_embedding_is() -> None:
    with pytest.raises(PeftcError, match="PC406"):
        get_peft_model(nn.Sequential(nn.Embedding(9, 4)), options())


def test_a_random_start_is_asked_for() -> None:
    model = get_peft_model(llama(), options(init_weights=False))
    assert not torch.allclose(logits(model), logits(llama()))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_the_reference_loads_what_is_saved_here(tied: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(tied), options())
    move(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(tied), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, others = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "theirs"))
    assert ours.keys() == others.keys()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_what_the_reference_saved_is_loaded_here(tied: bool, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(tied), peft.TrainableTokensConfig(token_indices=[3, 1, 5]))
    move(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = PeftModel.from_pretrained(llama(tied), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs))
    twins = {name for name, _ in model.named_parameters()}
    assert twins == {name for name, _ in theirs.named_parameters()}


def test_rows_of_a_tied_head_are_loaded_from_either_key_and_must_not_differ(tmp_path: Path) -> None:
    model = get_peft_model(llama(), options())
    move(model)
    model.save_pretrained(tmp_path)
    file, rows = tmp_path / "adapter_model.safetensors", model.adapter_tensors("default")[ROWS].clone()
    y = logits(model)

    save_file({ROWS_OF_THE_HEAD: rows}, file)
    with pytest.warns(PeftcWarning, match="PC609"):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), y)
    apart = {ROWS: rows, ROWS_OF_THE_HEAD: rows + 1}
    save_file(apart, file)
    with pytest.warns(PeftcWarning, match=r"PC608.*differs from.*they are one tensor here"):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), y)
    with pytest.warns(PeftcWarning, match=r"PC608.*differs from"):
        result = set_peft_model_state_dict(model, apart)
    assert result == ([], [])
    torch.testing.assert_close(logits(model), y)
    with pytest.raises(PeftcError, match=r"PC.*differs from"):
        hotswap_adapter_from_state_dict(model, apart, "default", options())
    hotswap_adapter_from_state_dict(model, {ROWS: rows * 2, ROWS_OF_THE_HEAD: rows * 2}, "default", options())
    torch.testing.assert_close(model.adapter_tensors("default")[ROWS_OF_THE_HEAD], rows * 2)


def test_deleting_and_unloading_leave_the_tied_model(recwarn: pytest.WarningsRecorder) -> None:
    base = llama()
    model = get_peft_model(base, options(), "one")
    model.add_adapter("two", options([7]))
    model.set_adapter("two")
    model.delete_adapter("one")
    move(model)
    assert not torch.allclose(logits(model), logits(llama()))
    assert model.unload() is base
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(logits(base), logits(llama()))
    assert not [w for w in recwarn if issubclass(w.category, PeftcWarning)]


def test_merging_keeps_the_tie() -> None:
    model = get_peft_model(llama(), options())
    move(model)
    base = model.merge_and_unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight
