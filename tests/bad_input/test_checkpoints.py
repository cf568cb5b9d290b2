"""Checkpoints that are missing, damaged, foreign, or cannot be written: each ends in its diagnostic, with nothing half done.

Every case has a mutation, a small defect put into peftc, under which the diagnostic does not come: so the case can fail.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc import rules
from peftc.checkpoint import format as file_format
from peftc.checkpoint import keys, load, report, save, values
from peftc.checkpoint.load import open_adapter
from peftc.checkpoint.names import WEIGHTS_NAME
from peftc.checkpoint.report import LoadReport, expected_tensors, match
from peftc.checkpoint.save import save_adapter, write_tensors
from peftc.diagnostics import Diagnostic, PeftcError, PeftcWarning, Rule
from peftc.graph.tensors import TensorFacts
from tests.defects import put_defect
from tests.unit import saving_driver
from tests.unit.adapters import adapter_plan, examples, little_graph

_, METHOD, EXAMPLE = next(e for e in examples() if e[1].adapts_layers)
PLAN = adapter_plan(METHOD, EXAMPLE)
KEY = next(iter(expected_tensors(PLAN)))

Act = Callable[[Path], Any]
Mutate = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Case:
    """Something bad, what is said about it, and the defect that would keep it from being said."""

    rule: Rule
    act: Act
    mutate: Mutate
    says: str


def provoke(act: Act, place: Path) -> list[Diagnostic]:
    """All that is reported: as an error, as warnings, or in a load report."""
    with pytest.WarningsRecorder(_ispytest=True) as shown:
        try:
            result = act(place)
        except PeftcError as error:
            return list(error.diagnostics)
    told = [w.message.diagnostic for w in shown if isinstance(w.message, PeftcWarning)]
    if isinstance(result, LoadReport):
        return [*told, *result.diagnostics]
    return [*told, *(result if isinstance(result, list) else [])]


# what is bad --------------------------------------------------------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    return {
        key: torch.ones(facts.shape).to(getattr(torch, facts.dtype)) for key, facts in expected_tensors(PLAN).items()
    }


def saved(place: Path) -> Path:
    save_adapter(place / "adapter", tensors(), PLAN.config)
    return place / "adapter"


def weights(place: Path, change: Callable[[bytes], bytes]) -> Any:
    file = saved(place) / WEIGHTS_NAME
    file.write_bytes(change(file.read_bytes()))
    return open_adapter(file.parent)


def file_of(*names: str, shape: tuple[int, ...] = (0,)) -> bytes:
    """A safetensors file of tensors without a number."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, entry)).encode()
    return len(header).to_bytes(8, "little") + header


def only_pickle(place: Path) -> Any:
    torch.save({"tensors": tensors()}, place / "adapter_model.bin")
    return open_adapter(place)


def misnamed(place: Path) -> Any:
    write_tensors(place / "adapter_modell.safetensors", tensors())
    return open_adapter(place)


def in_subfolder(place: Path) -> Any:
    saved(place)
    return open_adapter(place)


def the_file(place: Path) -> Any:
    return open_adapter(saved(place) / WEIGHTS_NAME)


def misspelt(place: Path) -> Any:
    return open_adapter(saved(place).parent / "adaptor")


def matched(change: Callable[[dict[str, TensorFacts]], dict[str, TensorFacts]]) -> Act:
    return lambda place: match(PLAN, change(expected_tensors(PLAN)))


def another_base(place: Path) -> Any:
    wide = adapter_plan(METHOD, EXAMPLE, width=16)
    here, there = little_graph(8).model, little_graph(16).model
    return match(PLAN, expected_tensors(wide), model=here, trained_on=there)


def save_over_a_file(place: Path) -> Any:
    (place / "adapter").write_text("mine")
    return save_adapter(place / "adapter", tensors(), PLAN.config)


def saving(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Act:
    return lambda place: save_adapter(place / "adapter", change(tensors()), PLAN.config)


def untrained(place: Path) -> Any:
    save_adapter(place, {KEY: tensors()[KEY] * 0}, PLAN.config)
    return list(values.stored_problems(open_adapter(place)))


def unreadable(place: Path) -> Any:
    return open_adapter("x" * 300)


def in_source(module: Any, before: str, after: str) -> Mutate:
    return lambda monkeypatch: put_defect(monkeypatch, module, before, after)


CASES = {
    "a pickle": Case(
        rules.CHECKPOINT_PICKLED,
        only_pickle,
        in_source(load, "_pickled(path, error) if pickled else", ""),
        "--to safetensors",
    ),
    "a folder without it": Case(
        rules.CHECKPOINT_MISSING,
        misnamed,
        in_source(load, "did_you_mean(WEIGHTS_NAME, names)", "''"),
        "Did you mean `adapter_modell.safetensors`?",
    ),
    "adapters below it": Case(
        rules.CHECKPOINT_MISSING,
        in_subfolder,
        in_source(load, "if inside:", "if False:"),
        "There are adapters in its subfolders",
    ),
    "the file": Case(
        rules.CHECKPOINT_MISSING, the_file, in_source(load, "if folder.is_file():", "if False:"), "Give the folder"
    ),
    "no folder": Case(
        rules.CHECKPOINT_MISSING,
        misspelt,
        in_source(load, "did_you_mean(folder.name, siblings)", "''"),
        "Did you mean `adapter`?",
    ),
    "a name too long": Case(
        rules.CHECKPOINT_UNREADABLE,
        unreadable,
        in_source(load, "_unreadable(local, error)", "_missing(Path())"),
        os.strerror(errno.ENAMETOOLONG),
    ),
    "cut short": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: raw[:-7]),
        in_source(file_format, "if missing > 0:", "if False:"),
        "the last 7 of",
    ),
    "cut inside the header": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: raw[:100]),
        in_source(file_format, 'the file was cut short"\n        )\n    raw', '"\n        )\n    raw'),
        "the file was cut short",
    ),
    "empty": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: b""),
        in_source(file_format, "it was cut short", "it is short"),
        "it was cut short",
    ),
    "another format": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: b"PK\3\4" * 100),
        in_source(file_format, "if length > MAX_HEADER:", "if False:"),
        "this is another format",
    ),
    "a side of 10**30": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: file_of("x", shape=(0, 10**30))),
        in_source(file_format, "    if reason:", "    if False:"),
        "`x` has a side beyond 64 bits",
    ),
    "70 dimensions": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: file_of("x", shape=(0,) * 70)),
        in_source(file_format, "    if reason:", "    if False:"),
        "`x` has 70 dimensions",
    ),
    "more tensors than there are": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: file_of(*(f"x{i}" for i in range(250_001)))),
        in_source(file_format, "if len(data) > MAX_TENSORS:", "if False:"),
        "lists 250,001 tensors, more than 250,000",
    ),
    "absurd offsets": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1)),
        in_source(file_format, "if end - begin != facts.numel * width:", "if False:"),
        "bytes, not",
    ),
    "bytes too many": Case(
        rules.CHECKPOINT_DAMAGED,
        lambda place: weights(place, lambda raw: raw + b"\0"),
        in_source(file_format, "if missing < 0:", "if False:"),
        "1 bytes follow",
    ),
    "no key known": Case(
        rules.NOTHING_LOADS,
        matched(lambda found: {f"a.{key}.b": facts for key, facts in found.items()}),
        in_source(report, "if not report.misfits and len(report.sources) == len(report.carried):", "if False:"),
        "None of the",
    ),
    "no tensor": Case(
        rules.NOTHING_LOADS,
        matched(lambda found: {}),
        in_source(report, "if not report.misfits and len(report.sources) == len(report.carried):", "if False:"),
        "holds no tensor",
    ),
    "a key missing": Case(
        rules.KEYS_MISSING,
        matched(lambda found: {key: facts for key, facts in found.items() if key != KEY}),
        in_source(report, "if report.missing:", "if False:"),
        KEY,
    ),
    "a key too many": Case(
        rules.KEYS_UNEXPECTED,
        matched(lambda found: {**found, "a.b": TensorFacts((1,), "float32")}),
        in_source(report, "if report.unexpected:\n        hint", "if False:\n        hint"),
        "`a.b`",
    ),
    "a shape": Case(
        rules.SHAPES_DIFFER,
        matched(lambda found: {**found, KEY: TensorFacts((7, 7), "float32")}),
        in_source(report, "if expected[key].shape != found[source].shape", "if False"),
        "(7, 7) in the file",
    ),
    "a wrapped model": Case(
        rules.KEYS_RENAMED,
        matched(lambda found: {f"_orig_mod.{key}": facts for key, facts in found.items()}),
        in_source(keys, "if part not in WRAPPERS", ""),
        "under another name",
    ),
    "another base": Case(
        rules.OTHER_BASE, another_base, in_source(report, "if not differ:", "if True:"), "hidden_size `16` against `8`"
    ),
    "empty shards": Case(
        rules.SAVE_INCOMPLETE,
        saving(lambda found: {key: t.new_empty(0) for key, t in found.items()}),
        in_source(values, "or (t.numel() == 0 and key not in empty)", ""),
        "Gather the parameters",
    ),
    "meta tensors": Case(
        rules.SAVE_INCOMPLETE,
        saving(lambda found: {key: t.to("meta") for key, t in found.items()}),
        in_source(values, "t.is_meta or ", ""),
        "Gather the parameters",
    ),
    "nothing to save": Case(
        rules.SAVE_INCOMPLETE,
        saving(lambda found: {}),
        in_source(values, "if hollow or not tensors:", "if hollow:"),
        "no tensor to save",
    ),
    "a strange dtype": Case(
        rules.SAVE_DTYPE,
        saving(lambda found: {KEY: found[KEY].to(torch.complex128)}),
        in_source(values, "if TensorFacts.of(tensor).dtype not in STORABLE", "if False"),
        "complex128",
    ),
    "infinity": Case(
        rules.TENSORS_NOT_FINITE,
        saving(lambda found: {**found, KEY: found[KEY] / 0}),
        in_source(values, "if not _finite(tensor(key))", "if False"),
        KEY,
    ),
    "a file in the way": Case(
        rules.SAVE_FAILED,
        save_over_a_file,
        in_source(save, "is a file, not a folder", "is wrong"),
        "is a file, not a folder",
    ),
    "zeros": Case(
        rules.UNTRAINED, untrained, in_source(values, ".any()) for key", ".all() or True) for key"), "are zero"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_ends_in_its_diagnostic(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    found = [d for d in provoke(case.act, tmp_path) if d.code == case.rule.code]
    assert len(found) == 1
    assert case.says in str(found[0])
    assert found[0].fix


@pytest.mark.parametrize("name", CASES)
def test_a_defect_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    case.mutate(monkeypatch)
    try:
        found = provoke(case.act, tmp_path)
    except Exception:
        return  # with the defect anything may happen, except for the diagnostic
    assert not [d for d in found if d.code == case.rule.code and case.says in str(d)]


# nothing half done --------------------------------------------------------------------------------------------------


REFUSALS = {
    "file size": "ulimit -f",
    "both": "Save to a folder that you may write to",
    "new in parent": "Save to a folder that you may write to",
}


@pytest.fixture(scope="module")
def refused(root: Path) -> dict[str, dict[str, Any]]:
    """What happened where the system refused, by case; in a process of its own, as an unprivileged user."""
    command = [sys.executable, saving_driver.__file__, "adapter", *REFUSALS, "read"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_save_is_a_diagnostic_and_leaves_the_old_adapter(refused: dict[str, Any], case: str) -> None:
    found = refused[case]
    assert found["codes"] == [rules.SAVE_FAILED.code]
    assert REFUSALS[case] in found["text"]
    assert found["same"], "the old adapter must be there, byte for byte"
    assert found["left"] == []


def test_a_file_that_may_not_be_read(refused: dict[str, Any]) -> None:
    assert refused["read"]["codes"] == [rules.CHECKPOINT_UNREADABLE.code]
    assert os.strerror(errno.EACCES) in refused["read"]["text"]


def test_a_full_disk_is_a_diagnostic_and_leaves_the_old_adapter(small_disk: Path) -> None:
    folder = saved(small_disk)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    big = {key: torch.ones(100_000) for key in tensors()}
    with pytest.raises(PeftcError, match=rules.SAVE_FAILED.code) as caught:
        save_adapter(folder, big, PLAN.config)
    assert "Free some space" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in small_disk.iterdir()] == ["adapter"]
