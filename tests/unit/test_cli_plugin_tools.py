"""`peftc plugins new` writes a whole distribution or nothing; `peftc plugins check` reports on one plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftc import rules
from peftc.cli import plugin_new
from peftc.cli.main import main
from peftc.diagnostics import PeftcError
from peftc.registry.manager import default_registry
from peftc.testing import kit
from tests.architecture.tree import ROOT
from tests.defects import put_defect

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

#: A whole plugin in a file, with a mistake: it starts at one and adds.
CARELESS = """
from peftc.plugin import *

class CarelessConfig(TargetsMixin, PeftConfig):
    peft_type: PeftType | None = PeftType("CARELESS")

class Careless(MapTuner[CarelessConfig]):
    supports = frozenset({Kind.LINEAR})
    def slots(self, c, layer):
        yield parameter_slot("careless_shift", (layer.out_features,))
    def init(self, c, layer, slots, init):
        init.ones(slots["careless_shift"])
    def output(self, a, y):
        return y * (1 + a.careless_shift)

@hookimpl
def peftc_tuner():
    return TunerMethod("CARELESS", CarelessConfig, Careless(), prefix="careless_", layer_names=("careless_shift",))
"""


@pytest.fixture
def careless(tmp_path: Path, monkeypatch: Patch) -> Iterator[str]:
    (tmp_path / "careless.py").write_text(CARELESS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield str(tmp_path / "careless.py")
    default_registry().forget("CARELESS")
    sys.modules.pop("careless", None)


# new ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Noisy-scale", "noisy_scale", "NOISY_SCALE"])
def test_one_name_gives_all_others(tmp_path: Path, capsys: Captured, name: str) -> None:
    assert main(["plugins", "new", name, "--dir", str(tmp_path / "new" / "place"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    folder = tmp_path / "new" / "place" / "peftc-noisy-scale"
    assert told == {
        "ok": True,
        "folder": str(folder),
        "peft_type": "NOISY_SCALE",
        "distribution": "peftc-noisy-scale",
        "module": "peftc_noisy_scale",
    }
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "peftc-noisy-scale"
    assert project["entry-points"] == {"peftc.tuners": {"noisy_scale": "peftc_noisy_scale"}}
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    package = ["peftc_noisy_scale/__init__.py", "peftc_noisy_scale/py.typed"]
    assert files == [".gitignore", "README.md", *package, "pyproject.toml", "tests/test_conformance.py"]
    assert not any("$" in (folder / file).read_text() for file in files)
    assert list(folder.parent.iterdir()) == [folder]


#: Strict, as the plugin's own settings are; what lies below the torch line is not looked into, which would take a minute.
TYPES = """
[mypy]
strict = True
plugins = pydantic.mypy
follow_imports = silent
[mypy-torch.*,transformers.*,huggingface_hub.*,peftc.model.*,peftc.runtime.*,peftc.checkpoint.*,peftc.integrations.*]
follow_imports = skip
"""


def test_what_is_written_passes_lint_and_types(tmp_path: Path) -> None:
    assert main(["plugins", "new", "noisy-scale", "--dir", str(tmp_path)]) == 0
    folder = tmp_path / "peftc-noisy-scale"
    (tmp_path / "mypy.ini").write_text(TYPES)
    types = ["mypy", "--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    for words in (["ruff", "check"], ["ruff", "format", "--check"], [*types, "peftc_noisy_scale"]):
        command = [sys.executable, "-m", *words]
        environment = {**os.environ, "MYPYPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lo ra", "lo-ra"),
        ("2nd", "nd"),
        ("a--b", "a-b"),
        ("été", "t"),
        ("-x-", "x"),
        ("a/../b", "a-b"),
        ("..", "my-method"),
    ],
)
def test_a_bad_name_is_refused_with_the_nearest_good_one(
    tmp_path: Path, capsys: Captured, name: str, nearest: str
) -> None:
    assert main(["plugins", "new", "--dir", str(tmp_path), "--", name]) == 1
    told = capsys.readouterr().err
    assert rules.PLUGIN_NAME.code in told and f"Use `{nearest}`." in told
    assert plugin_new.names_of(nearest, kit.default_registry()).entry
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_registered_is_refused(tmp_path: Path, capsys: Captured) -> None:
    taken = default_registry().claims[0]
    assert main(["plugins", "new", taken.name, "--dir", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert rules.TYPE_TAKEN.code in told and str(taken) in told
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "peftc-noisy").mkdir()
    assert main(["plugins", "new", "noisy", "--dir", str(tmp_path)]) == 1
    assert rules.FOLDER_TAKEN.code in capsys.readouterr().err
    assert list((tmp_path / "peftc-noisy").iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: Patch, capsys: Captured) -> None:
    written = []

    def full(path: Path, *args: object, **kwargs: object) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["plugins", "new", "noisy", "--dir", str(tmp_path)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert len(written) == 3 and list(tmp_path.iterdir()) == []


def test_the_rules_about_names_can_fail(tmp_path: Path, capsys: Captured, monkeypatch: Patch) -> None:
    put_defect(monkeypatch, plugin_new, "if not _NAME.fullmatch(entry):", "if False:")
    with pytest.raises((AssertionError, PeftcError)):
        test_a_bad_name_is_refused_with_the_nearest_good_one(tmp_path, capsys, "lo ra", "lo-ra")
    put_defect(monkeypatch, plugin_new, "if names.peft_type in registry.names or registry", "if False and registry")
    with pytest.raises(AssertionError):
        test_a_name_that_is_registered_is_refused(tmp_path / "other", capsys)


# check ----------------------------------------------------------------------------------------------------------------


def test_check_tells_a_failing_plugin_what_is_wrong(careless: str, capsys: Captured) -> None:
    assert main(["plugins", "check", careless, "--only", "starts_as_declared", "--only", "acts_when_trained"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("CARELESS fails ")
    assert "starts_as_declared, on no-options-mlp" in out
    assert "identity_at_start" in out
    assert "acts_when_trained" not in out
    assert "Checking CARELESS" in err


def test_check_as_json(careless: str, capsys: Captured) -> None:
    assert main(["plugins", "check", careless, "--only", "acts_when_trained", "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["ok"], told["peft_type"], told["findings"], err) == (True, "CARELESS", [], "")
    assert main(["plugins", "check", careless, "--only", "starts_as_declared", "--json", "-q"]) == 1
    (first, *_) = json.loads(capsys.readouterr().out)["findings"]
    assert (first["check"], first["diagnostics"][0]["code"]) == ("starts_as_declared", rules.NOT_CONFORMANT.code)


def test_an_installed_method_is_checked_by_its_type_or_its_entry_point(capsys: Captured) -> None:
    claim = next(c for c in default_registry().claims if default_registry().get(c.peft_type).adapts_layers)
    for name in (claim.name, claim.peft_type):
        assert main(["plugins", "check", name, "--only", "plan_survives_json", "-q"]) == 0
        assert capsys.readouterr().out.startswith(f"{claim.peft_type} passes all")


def test_a_new_plugin_is_checked_by_its_folder(tmp_path: Path, monkeypatch: Patch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["plugins", "new", "by-folder"]) == 0
    capsys.readouterr()
    try:
        assert main(["plugins", "check", "peftc-by-folder", "--only", "plan_survives_json", "-q"]) == 0
        assert "BY_FOLDER" in capsys.readouterr().out
    finally:
        default_registry().forget("BY_FOLDER")
        sys.modules.pop("peftc_by_folder", None)


def test_a_check_that_is_not_there(careless: str, capsys: Captured, monkeypatch: Patch) -> None:
    words = ["plugins", "check", careless, "--only", "starts_as_declare"]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert rules.UNKNOWN_CHECK.code in told and "`starts_as_declared`" in told
    put_defect(monkeypatch, kit, "did_you_mean(name, there)", "''")
    assert main(words) == 1
    assert "Did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("1 / 0", "PC205", "`import` of careless.py raised ZeroDivisionError"),
        ("x = 1", "PC204", "no function is marked `@hookimpl`"),
        ("def peftc_tuner(): raise KeyError('oh')", "PC204", "no function is marked `@hookimpl`"),
        (
            "from peftc.plugin import hookimpl\n@hookimpl\ndef peftc_tuner(): raise KeyError('oh')",
            "PC202",
            "careless.py:3: def peftc_tuner(): raise KeyError('oh')",
        ),
    ],
)
def test_a_file_that_is_no_plugin(careless: str, capsys: Captured, source: str, code: str, says: str) -> None:
    Path(careless).write_text(source)
    assert main(["plugins", "check", careless, "-q"]) == 1
    told = capsys.readouterr().err
    assert code in told and says in told


@pytest.mark.parametrize("words", [["new"], ["check"], ["check", "one", "two"], ["frobnicate"]])
def test_wrong_usage(words: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plugins", *words])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_new_plugin_needs_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from peftc.cli.main import main
assert main(["plugins", "new", "noisy", "--dir", {str(tmp_path)!r}]) == 0
assert not {{"torch", "transformers", "safetensors", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
