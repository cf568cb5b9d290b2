"""Prompt tuning: where virtual tokens start, and what a config must say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from peftc import PeftcError, PeftModel, PromptTuningConfig, get_peft_model
from peftc.diagnostics import ConfigError
from peftc.testing.models import MODELS

LLAMA = next(model for model in MODELS if model.name == "llama")


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A folder with a tokenizer that knows three words."""
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "answer": 7, "in": 8, "verse": 9}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(str(tmp_path))
    return str(tmp_path)


def wrapped(**options: Any) -> PeftModel:
    return get_peft_model(LLAMA.build(), PromptTuningConfig(task_type="CAUSAL_LM", **options))


def table(model: PeftModel) -> Tensor:
    return model.prompt_encoder["default"].embedding.weight


def vocabulary(model: PeftModel) -> Tensor:
    embeddings: nn.Embedding = model.get_base_model().get_input_embeddings()
    return embeddings.weight


def test_a_random_start() -> None:
    found = table(wrapped(num_virtual_tokens=200))
    assert found.shape == (200, 16)
    assert float(found.detach().std()) == pytest.approx(1.0, rel=0.1)


def test_a_start_from_sampled_tokens() -> None:
    model = wrapped(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB")
    rows = [row.tolist() for row in vocabulary(model)]
    assert all(row.tolist() in rows for row in table(model))


@pytest.mark.parametrize(("count", "ids"), [(3, [7, 8, 9]), (5, [7, 8, 9, 7, 8]), (2, [7, 8])])
def test_a_start_from_a_text_that_is_repeated_or_cut(tokenizer: str, count: int, ids: list[int]) -> None:
    model = wrapped(
        num_virtual_tokens=count,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="answer in verse",
        tokenizer_name_or_path=tokenizer,
    )
    assert torch.equal(table(model), vocabulary(model)[ids])


def test_a_tokenizer_that_is_not_there_leaves_the_model_alone() -> None:
    base = LLAMA.build()
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a",
        tokenizer_name_or_path="no/such-tokenizer",
    )
    with pytest.raises(PeftcError, match="PC512"):
        get_peft_model(base, config)
    assert all(p.requires_grad for p in base.parameters())
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_text_without_tokens_is_refused(tokenizer: str) -> None:
    with pytest.raises(PeftcError, match="PC102"):
        wrapped(
            num_virtual_tokens=2,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=" ",
            tokenizer_name_or_path=tokenizer,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_tuning_init": "TEXT"},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
        {"tokenizer_kwargs": {"use_fast": True}},
        {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "a",
            "tokenizer_name_or_path": "b",
            "tokenizer_kwargs": {"trust_remote_code": True},
        },
    ],
)
def test_options_that_cannot_be_followed_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PromptTuningConfig(num_virtual_tokens=2, **options)


def test_the_number_of_tokens_must_be_said() -> None:
    with pytest.raises(PeftcError, match="PC419"):
        wrapped()


def test_tokens_start_in_float32_beside_a_half_precision_base() -> None:
    base = LLAMA.build(torch.bfloat16)
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="SAMPLE_VOCAB"))
    assert table(model).dtype == torch.float32
    assert model(**LLAMA.arguments()).logits.dtype == torch.bfloat16
