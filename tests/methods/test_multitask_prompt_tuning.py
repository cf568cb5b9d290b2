"""Multitask prompt tuning: tasks of the rows, and starts from an adapter trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftc import MultitaskPromptTuningConfig, PeftcError, PeftModel, PromptTuningConfig, get_peft_model
from peftc import MultitaskPromptTuningInit as Init
from peftc.diagnostics import ConfigError
from peftc.testing.models import MODELS, seeded

LLAMA = next(model for model in MODELS if model.name == "llama")


def wrapped(**options: Any) -> PeftModel:
    config = MultitaskPromptTuningConfig(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **options})
    return get_peft_model(LLAMA.build(), config).eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A saved adapter of three tasks."""
    with seeded(7):
        model = wrapped(num_tasks=3, num_ranks=2)
    model.save_pretrained(tmp_path)
    return tmp_path


def started(source: Path | str, init: Init, **options: Any) -> PeftModel:
    return wrapped(num_ranks=2, prompt_tuning_init=init, prompt_tuning_init_state_dict_path=str(source), **options)


def tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    return model.adapter_tensors("default")


def test_each_row_has_the_tokens_of_its_task() -> None:
    model = wrapped(num_tasks=3)
    both = model.get_prompt(2, task_ids=torch.tensor([2, 0]))
    assert torch.equal(both[0], model.get_prompt(1, task_ids=torch.tensor([2]))[0])
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"], ids=["folder", "file"])
def test_a_start_from_one_task_or_from_all(source: Path, name: str) -> None:
    saved = tensors(PeftModel.from_pretrained(LLAMA.build(), source))
    one = tensors(started(source / name, Init.EXACT_SOURCE_TASK, prompt_tuning_init_task=2))
    mean = tensors(started(source / name, Init.AVERAGE_SOURCE_TASKS))
    shared = tensors(started(source / name, Init.ONLY_SOURCE_SHARED, num_tasks=4))
    for key in ("prefix_task_cols", "prefix_task_rows"):
        assert torch.equal(one[key], saved[key][2:3])
        torch.testing.assert_close(mean[key], saved[key].mean(0, keepdim=True))
        assert shared[key].shape[0] == 4
    for found in (one, mean, shared):
        assert torch.equal(found["prompt_embeddings"], saved["prompt_embeddings"])


def test_a_saved_adapter_needs_its_source_no_more(source: Path, tmp_path: Path) -> None:
    started(source, Init.AVERAGE_SOURCE_TASKS).save_pretrained(tmp_path / "target")
    (source / "adapter_model.safetensors").unlink()
    PeftModel.from_pretrained(LLAMA.build(), tmp_path / "target")


@pytest.mark.parametrize(
    ("path", "options", "code"),
    [
        ("nowhere.safetensors", {}, "PC601"),
        ("weights.bin", {}, "PC601"),
        ("", {"prompt_tuning_init_task": 3}, "PC102"),
        ("", {"num_virtual_tokens": 4}, "PC532"),
    ],
)
def test_a_source_that_cannot_be_used(source: Path, path: str, options: dict[str, Any], code: str) -> None:
    with pytest.raises(PeftcError, match=code):
        started(source / path, Init.EXACT_SOURCE_TASK, **options)


def test_a_source_that_torch_saved(source: Path, tmp_path: Path) -> None:
    saved = load_file(source / "adapter_model.safetensors")
    torch.save(saved, tmp_path / "weights.bin")
    found = tensors(started(tmp_path / "weights.bin", Init.ONLY_SOURCE_SHARED))
    assert torch.equal(found["prompt_embeddings"], saved["prompt_embeddings"])


def test_a_source_of_another_method(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(LLAMA.build(), config).save_pretrained(tmp_path)
    with pytest.raises(PeftcError, match="has no `prefix_task_cols`"):
        started(tmp_path, Init.EXACT_SOURCE_TASK)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_tuning_init": "EXACT_SOURCE_TASK"},
        {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": "a", "num_tasks": 2},
        {"prompt_tuning_init": "TEXT"},
        {"prompt_tuning_init": "SAMPLE_VOCAB"},
        {"num_tasks": 0},
    ],
)
def test_options_that_cannot_be_followed_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MultitaskPromptTuningConfig(**options)
