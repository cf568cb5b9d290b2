"""An adapter that the commands made finds its base from any folder, and is not merged into, converted on or trained on with
another one of the same shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from peftc import rules
from tests.integration import tiny
from tests.integration.test_cli_jobs import METHODS, QUESTIONS, _interrupt_third, run, write_spec

METHOD = next(method for method in METHODS if method.is_rankable)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`project/` with a base, data and a spec; `elsewhere/` with another base under the same relative name."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    tiny.save_base(project / "base")
    tiny.write_lines(project / "data.jsonl", QUESTIONS)
    write_spec(project, METHOD)
    shutil.copytree(project / "base", elsewhere / "base")
    other = tiny.model(seed=1)
    other.save_pretrained(elsewhere / "base")
    return tmp_path


def spec_of(place: Path) -> Path:
    return Path(f"{METHOD.peft_type.lower()}.yaml")


def code_of(out: str) -> list[str]:
    return [d["code"] for d in json.loads(out)["diagnostics"]]


def test_the_base_is_found_from_any_folder(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "project")
    assert run(capsys, "train", spec_of(place), "-q")[0] == 0
    named = json.loads((place / "project/out/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(place / "project" / "base")
    monkeypatch.chdir(place / "elsewhere")  # where `base` is another one
    code, _, err = run(capsys, "merge", "--adapter", place / "project/out", "-o", "merged")
    assert code == 0 and rules.OTHER_BASE.code not in err


@pytest.mark.parametrize(
    "words", [["merge"], ["convert", "--to", METHOD.peft_type, "--rank", "1"]], ids=["merge", "to"]
)
def test_nothing_is_saved_of_an_adapter_on_another_base(
    words: list[str], place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "project")
    assert run(capsys, "train", spec_of(place), "-q")[0] == 0
    asked: list[Any] = [*words, "--adapter", "out", "-o", "made", "--base", place / "elsewhere" / "base", "-q"]
    code, out, _ = run(capsys, *asked, "--json")
    assert code == 1 and code_of(out) == [rules.OTHER_BASE.code]
    assert not Path("made").exists()
    code, out, err = run(capsys, *asked, "--any-base")
    assert code == 0 and rules.OTHER_BASE.code in err and Path("made").is_dir()


def test_a_training_does_not_go_on_with_another_base(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "project")
    with monkeypatch.context() as patch:
        patch.setattr(TrainerCallback, "on_step_begin", _interrupt_third)
        assert run(capsys, "train", spec_of(place), "-q")[0] == 130
    monkeypatch.chdir(place)  # the same spec by another path is the same training
    torch.manual_seed(0)
    spec = Path("project") / spec_of(place)
    tiny.model(seed=1).save_pretrained(place / "project" / "base")
    code, out, _ = run(capsys, "train", spec, "--resume", "--json", "-q")
    assert code == 1 and code_of(out) == [rules.CANNOT_RESUME.code]
    assert "The base model has other weights" in out
    tiny.model().save_pretrained(place / "project" / "base")
    assert run(capsys, "train", spec, "--resume", "-q")[0] == 0
