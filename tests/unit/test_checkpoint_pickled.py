"""`peftc convert DIR --to safetensors`: a pickle's tensors, bit for bit, without running what is in it."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftc import PeftcError, rules
from peftc.checkpoint.load import open_adapter
from peftc.checkpoint.pickled import pickle_to_safetensors, read_pickle
from peftc.cli import main
from peftc.registry.manager import default_registry

MARK = "ran.txt"


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place / MARK,)


def tensors() -> dict[str, torch.Tensor]:
    whole = torch.arange(12.0).reshape(3, 4)
    return {"a.first.weight": whole[:, :2], "a.second.weight": whole.T, "b": torch.ones(2, dtype=torch.bfloat16)}


def pickled(folder: Path, held: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(held, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_beside_the_pickle_or_in_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pickled(tmp_path / "old", OrderedDict(tensors()))
    with pytest.raises(PeftcError, match="--to safetensors"):
        open_adapter(folder)
    assert main.main(["convert", str(folder), "--to", "safetensors"]) == 0
    assert "3 tensors" in capsys.readouterr().out
    words = ["--adapter", str(folder), "--to", "Safetensors", "-o", str(tmp_path / "new")]
    assert main.main(["convert", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 3
    for place in (folder, tmp_path / "new"):
        found = load_file(place / "adapter_model.safetensors")
        assert found.keys() == tensors().keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors().items())
        assert (place / "adapter_config.json").is_file()
    assert (folder / "adapter_model.bin").is_file()


def test_what_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "old", tensors())
    pickle_to_safetensors(folder)
    with pytest.raises(PeftcError, match=rules.FOLDER_TAKEN.code):
        pickle_to_safetensors(folder)


HELD = {
    "code": lambda place: {"a": Runs(place)},
    "an object": lambda place: torch.nn.Linear(2, 2),
    "a list": lambda place: [torch.ones(1)],
    "a whole training": lambda place: {"model": tensors(), "step": 3},
    "names that are none": lambda place: {3: torch.ones(1)},
    "sparse": lambda place: {"a": torch.eye(3).to_sparse()},
}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_what_is_no_plain_adapter_is_refused(held: Any, tmp_path: Path) -> None:
    folder = pickled(tmp_path / "old", held(tmp_path))
    with pytest.raises(PeftcError, match=rules.PICKLE_CONTENT.code):
        pickle_to_safetensors(folder)
    assert not (tmp_path / MARK).exists()
    assert not (folder / "adapter_model.safetensors").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match=rules.CHECKPOINT_MISSING.code):
        read_pickle(tmp_path)
    file = pickled(tmp_path / "old", tensors()) / "adapter_model.bin"
    for raw in (b"", b"nothing", file.read_bytes()[:-50]):
        file.write_bytes(raw)
        with pytest.raises(PeftcError, match=rules.PICKLE_CONTENT.code):
            read_pickle(file.parent)
    file.unlink()
    file.mkdir()
    with pytest.raises(PeftcError, match=rules.CHECKPOINT_UNREADABLE.code):
        read_pickle(file.parent)


def test_a_type_needs_a_rank_and_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["convert", str(tmp_path), "--to", default_registry().names[0]]) == 1
    assert rules.MISSING_KEY.code in capsys.readouterr().err
