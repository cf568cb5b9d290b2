"""Commands with adapters that concern the vocabulary: one that carries resized embeddings, one that trained a tied head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftc import PeftcError, get_peft_model
from peftc.cli.inspect import look
from peftc.integrations.transformers import jobs
from tests.integration import tiny
from tests.runtime.methods import METHODS, narrow
from tests.unit.fakes import registered

IDS = torch.arange(3, 9)[None]


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(*METHODS):
        yield


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def saved(place: Path, rows: int = 0, **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter's folder, beside that of its base, and what the adapted model gives."""
    tiny.model().save_pretrained(place / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(place / "base")
    if rows:
        base.resize_token_embeddings(base.config.vocab_size + rows)
    model = get_peft_model(base, narrow(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})).eval()
    with torch.no_grad():
        for place_of, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 + 0.01 * place_of)
    model.save_pretrained(place / "adapter")
    return place / "adapter", logits(model)


def test_a_resized_vocabulary_needs_no_help(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, rows=5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = jobs.with_adapter(base, folder).eval()
    assert torch.equal(logits(loaded), expected)
    assert not look(str(folder), values=False).problems.errors
    merged = jobs.merge(loaded, None, tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_adapted_tied_head_is_merged_on_demand_only(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, target_modules=["lm_head"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.config.tie_word_embeddings
    model = jobs.with_adapter(base, folder).eval()
    with pytest.raises(PeftcError, match="PC650"):
        jobs.merge(model, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    jobs.merge(model, None, tmp_path / "merged", untie=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [["lm_head"], ["lm_head", "embed_tokens"]], ids=str)
def test_a_tied_head_that_was_trained_whole_is_merged_and_untied(tmp_path: Path, whole: list[str]) -> None:
    folder, expected = saved(tmp_path, modules_to_save=whole)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.config.tie_word_embeddings
    model = jobs.with_adapter(base, folder).eval()
    with pytest.warns(UserWarning, match="`tie_word_embeddings` of the model's config is `False` now"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
