"""A merge by files that comes to numbers that are not finite is refused, whichever way it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peftc import get_peft_config, get_peft_model, rules
from peftc.integrations.transformers import by_rows
from peftc.runtime.applying import bare
from peftc.testing.subjects import quiet
from tests.defects import put_defect
from tests.integration.test_merge_by_files import merged, refused, save_model
from tests.runtime.methods import METHODS
from tests.runtime.saving import moved
from tests.unit.fakes import registered


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(*METHODS):
        yield


@pytest.mark.parametrize(
    ("method", "module", "before", "after"),
    [
        ("NARROW", by_rows, "if not is_finite(summed):", "if False:"),
        ("STRETCH", bare, "merged_parameters([self._name], check=True)", "merged_parameters([self._name])"),
    ],
)
def test_a_merge_to_nan_is_refused(
    method: str,
    module: ModuleType,
    before: str,
    after: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By blocks of rows where an adapter adds to a weight, and by whole tensors where it does something else."""
    base = save_model(tmp_path / "base", "llama", torch.float32, tied=False)
    config = get_peft_config({"peft_type": method, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with quiet():
        moved(get_peft_model(model, config)).save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("inf"))
    save_file(tensors, file, {"format": "pt"})
    assert refused(capsys, tmp_path) == [rules.MERGE_NOT_FINITE.code]
    put_defect(monkeypatch, module, before, after)
    assert merged(capsys, tmp_path / "adapter", tmp_path / "defect")["built"] is False
