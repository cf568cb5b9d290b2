"""What compares the two libraries sees differences, and only those that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.ecosystem.both import Both, differences, file_differences


@pytest.mark.parametrize(
    ("real", "alias"),
    [
        (1.0, 1.00001),
        ({"a": 1}, {}),
        ({}, {"a": 1}),
        ([1, 2], [1]),
        ({"a": [0.5, {"b": True}]}, {"a": [0.5, {"b": False}]}),
        (float("nan"), 0.0),
        (1.0, None),
    ],
)
def test_a_difference_is_seen(real: Any, alias: Any) -> None:
    assert len(list(differences(real, alias))) == 1


@pytest.mark.parametrize(
    ("real", "alias"),
    [
        (1.0, 1.0000001),
        (1e6, 1e6 + 0.5),
        ({"loss": 1, "train_runtime": 3.5, "peft_version": "0.21.2"}, {"loss": 1, "train_runtime": 4}),
        ([float("nan")], [float("nan")]),
    ],
)
def test_rounding_times_and_versions_are_no_difference(real: Any, alias: Any) -> None:
    assert not list(differences(real, alias))


def folders(root: Path) -> Both:
    """Two folders with the same files."""
    both = Both(root / "real", root / "alias")
    for folder in (both.real, both.alias):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "target_modules": ["a", "b"]}))
        (folder / "README.md").write_text("---\nlibrary_name: peft\ntags:\n- lora\n- sft\n---\nText\n")
        (folder / "optimizer.pt").write_bytes(folder.name.encode())
        save_file({"w": torch.ones(2)}, folder / "adapter_model.safetensors", {"format": "pt"})
    return both


def test_files_are_compared_by_what_they_mean(tmp_path: Path) -> None:
    both = folders(tmp_path)
    (both.alias / "adapter_config.json").write_text(json.dumps({"target_modules": ["b", "a"], "r": 4}))
    (both.alias / "README.md").write_text("---\ntags:\n- sft\n- lora\nlibrary_name: peft\n---\nAnother text\n")
    (both.alias / "peftc_plan.json").write_text("{}")
    local = (
        f"---\nbase_model: {tmp_path}\nlibrary_name: peft\ntags:\n- base_model:adapter:{tmp_path}\n- lora\n- sft\n---\n"
    )
    (both.real / "README.md").write_text(local)
    assert not list(file_differences(both))


def test_differences_of_files_are_seen(tmp_path: Path) -> None:
    both = folders(tmp_path)
    (both.alias / "optimizer.pt").unlink()
    (both.alias / "adapter_config.json").write_text(json.dumps({"r": 8, "target_modules": ["a", "b"]}))
    (both.alias / "README.md").write_text("---\nlibrary_name: transformers\ntags:\n- lora\n- sft\n---\n")
    save_file({"w": torch.ones(2).half()}, both.alias / "adapter_model.safetensors")
    found = " ".join(file_differences(both))
    assert len(list(file_differences(both))) == 5
    for part in (
        "optimizer.pt",
        "adapter_config.json.r",
        "README.md.library_name",
        ".tensors.w[0]",
        ".metadata.format",
    ):
        assert part in found
