"""Cartridges: frozen tokens, starts from what the model has read, and joining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peftc import (
    CartridgeConfig,
    PeftcError,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from peftc.checkpoint.load import load_adapter_tensors
from peftc.diagnostics import ConfigError
from peftc.testing.models import MODELS

LLAMA = next(model for model in MODELS if model.name == "llama")


def wrapped(config: type = CartridgeConfig, **options: Any) -> PeftModel:
    return get_peft_model(LLAMA.build(), config(task_type="CAUSAL_LM", **{"num_virtual_tokens": 3, **options})).eval()


def read(model: PeftModel, ids: Tensor) -> Any:
    with torch.no_grad(), model.disable_adapter():
        return model(input_ids=ids, use_cache=True).past_key_values


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 5, "b": 6, "c": 7, "d": 8}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def test_the_first_tokens_are_frozen() -> None:
    model = wrapped(num_frozen_tokens=1)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"prompt_encoder.default.trainable_embedding": (2, 32)}
    model.set_adapter("default")
    assert not model.prompt_encoder["default"].frozen_embedding.requires_grad


@pytest.mark.parametrize("kind", [CartridgeConfig, PrefixTuningConfig])
def test_a_model_that_starts_from_a_text_goes_on_as_if_it_had_read_it(kind: type) -> None:
    model, ids = wrapped(kind), torch.tensor([[5, 6, 7, 8, 9]])
    table = initialize_kv_prefix_from_past_key_values(model, past_key_values=read(model, ids[:, :3]))
    assert torch.equal(table, model.prompt_encoder["default"]())
    with torch.no_grad():
        found = model(input_ids=ids[:, 3:]).logits
        with model.disable_adapter():
            expected = model(input_ids=ids).logits[:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_text_is_read_by_the_base_model(tokenizer: PreTrainedTokenizerFast) -> None:
    model = wrapped()
    table = initialize_kv_prefix_from_text(model, tokenizer, text="a b c d", max_length=3)
    expected = prompt_embeddings_from_past_key_values(read(model, torch.tensor([[5, 6, 7]])), num_virtual_tokens=3)
    assert torch.equal(table, expected)
    tokenizer.chat_template = "{% for m in messages %}b {{ m['content'] }}{% endfor %}"
    table = initialize_kv_prefix_from_text(model, tokenizer, text="a c", adapter_name="default")
    expected = prompt_embeddings_from_past_key_values(read(model, torch.tensor([[6, 5, 7]])), num_virtual_tokens=3)
    assert torch.equal(table, expected)


def test_starts_that_are_not_possible(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PeftcError, match="holds 2 tokens, and 3 are needed"):
        initialize_kv_prefix_from_text(wrapped(), tokenizer, text="a b")
    with pytest.raises(PeftcError, match="does not add keys and values"):
        initialize_kv_prefix_from_text(wrapped(PromptTuningConfig), tokenizer, text="a b c")
    projected = wrapped(PrefixTuningConfig, prefix_projection=True)
    with pytest.raises(PeftcError, match="PC532"):
        initialize_kv_prefix_from_text(projected, tokenizer, text="a b c")
    with pytest.raises(PeftcError, match=r"The table is \(2, 32\)"):
        initialize_kv_prefix_from_text(wrapped(), tokenizer, text="a b c", num_virtual_tokens=2)
    with pytest.raises(PeftcError, match="PC502"):
        initialize_kv_prefix_from_text(wrapped(), tokenizer, text="a b c", adapter_name="nobody")
    with pytest.raises(PeftcError, match="Read one sequence"):
        prompt_embeddings_from_past_key_values([(torch.ones(2, 1, 4, 2),) * 2], num_virtual_tokens=2)
    with pytest.raises(PeftcError, match="is empty"):
        prompt_embeddings_from_past_key_values([], num_virtual_tokens=2)


def test_cartridges_are_joined_one_after_the_other(tmp_path: Path) -> None:
    tables = []
    for name in ("one", "two"):
        model = wrapped(num_frozen_tokens=1)
        model.save_pretrained(tmp_path / name)
        tables.append(model.get_prompt_embedding_to_save("default"))
    compose_cartridge_adapters([tmp_path / "one", str(tmp_path / "two")], output_path=tmp_path / "both")
    found = load_file(tmp_path / "both" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(found, torch.cat(tables))
    model = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "both")
    assert (model.active_peft_config.num_virtual_tokens, model.active_peft_config.num_frozen_tokens) == (6, 1)


def test_what_cannot_be_joined(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path / "one")
    wrapped(PrefixTuningConfig).save_pretrained(tmp_path / "prefix")
    get_peft_model(MODELS[-1].build(), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "other"
    )
    for paths, said in (
        (["one"], "nothing to join"),
        (["one", "prefix"], "not a cartridge"),
        (["one", "other"], "another"),
    ):
        with pytest.raises(PeftcError, match=said):
            compose_cartridge_adapters([tmp_path / path for path in paths], output_path=tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_joined_in_the_format_of_torch(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path / "one")
    for name, safe in (("both", False), ("safe", True)):
        compose_cartridge_adapters([tmp_path / "one"] * 2, output_path=tmp_path / name, safe_serialization=safe)
    assert not (tmp_path / "both" / "adapter_model.safetensors").exists()
    found, expected = load_adapter_tensors(tmp_path / "both"), load_adapter_tensors(tmp_path / "safe")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_more_frozen_tokens_than_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_frozen_tokens"):
        CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3)
    with pytest.raises(ConfigError):
        CartridgeConfig(num_frozen_tokens=-1)
