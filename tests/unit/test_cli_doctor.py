"""`peftc doctor` tells what is installed, what does not fit and what was tried; records of runs are what it compares with."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from peftc import compat, rules
from peftc.cli import doctor
from peftc.cli.main import main
from peftc.installed import tried
from peftc.installed.requirements import needs
from peftc.installed.tried import Run, runs_from, with_run
from peftc.registry.manager import Claim, Registry
from tests import record
from tests.defects import put_defect
from tests.environments.made_up import python, release, without

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _as_in_a_program_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have imported the reference, which the command would tell."""
    monkeypatch.setattr(compat, "_real_one", lambda: [])


def told(capsys: Captured, code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def a_run(environment: str = "newest", transformers: str = "5.24.0", **counts: int) -> Run:
    counted = {"passed": 3, "failed": 0, "skipped": 1, **counts}
    return Run(environment, "2026-01-01", "3.11.7", {"transformers": transformers, "torch": "2.13.0"}, **counted)


def test_everything_that_peftc_needs_is_shown(capsys: Captured) -> None:
    found = told(capsys)
    shown = {package["name"]: package["installed"] for package in found["packages"]}
    assert {need.name: version(need.name) for need in needs()}.items() <= shown.items()
    assert {name: version(name) for name in ("trl", "diffusers", "sentence-transformers")}.items() <= shown.items()
    assert found["alias"] == {"says": compat.VERSION, "real": version("peft")}
    assert {plugin["state"] for plugin in found["plugins"]} == {"loads"}
    assert found["ok"] and found["diagnostics"] == []


def test_the_table_says_the_same(capsys: Captured) -> None:
    found = told(capsys)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for package in found["packages"]:
        assert any(line.split()[:2] == [package["name"], package["installed"]] for line in lines), package
    assert any(line.split()[:1] == ["accelerators"] for line in lines)
    assert f"{len(found['plugins'])} load" in "\n".join(lines)


def test_a_release_that_was_tried_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    here = a_run(transformers=version("transformers"))

    def is_told() -> None:
        monkeypatch.setattr(tried, "runs", lambda: (here, a_run(transformers="5.1.0")))
        rows = {p["name"]: doctor._row(doctor.Package(**p)) for p in told(capsys)["packages"]}
        assert rows["transformers"][-1] == "yes"
        assert rows["torch"][-1] == "yes", "a build of the release that was tried"
        assert rows["trl"][-1] == "no"
        monkeypatch.setattr(tried, "runs", lambda: (a_run(transformers="5.1.0"),))
        rows = {p["name"]: doctor._row(doctor.Package(**p)) for p in told(capsys)["packages"]}
        assert rows["transformers"][-1] == "no; 5.1.0"

    is_told()
    put_defect(monkeypatch, tried, 'version.partition("+")[0]', "version")
    with pytest.raises(AssertionError):
        is_told()


def test_what_does_not_fit_is_told_with_the_line_to_install(tmp_path: Path) -> None:
    release(
        release(release(tmp_path, "transformers", "6.0.0"), "accelerate", "0.1.0"),
        "trl",
        "9.0.0",
        "Requires-Dist: peft",
    )
    done = python("-m", "peftc", "doctor", front=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count(rules.RELEASE_OUTSIDE.code) == 2, "accelerate belongs to an extra, and is installed"
    assert 'pip install "transformers>=' in done.stderr and 'pip install "accelerate>=' in done.stderr
    assert any(line.split()[:2] == ["transformers", "6.0.0"] for line in done.stdout.splitlines())


def test_a_second_peftc_is_told(tmp_path: Path) -> None:
    done = python("-m", "peftc", "doctor", front=release(tmp_path, "peftc", "9.9.9"))
    assert done.returncode == 1
    assert rules.ALIAS_TWICE.code in done.stderr and "9.9.9" in done.stderr and "pip uninstall peftc" in done.stderr


def test_no_library_is_imported_but_torch() -> None:
    program = "import sys; from peftc.cli.main import main; main(['doctor']); print(*sys.modules)"
    loaded = set(python("-c", program).stdout.splitlines()[-1].split())
    assert "torch" in loaded and not loaded & {"transformers", "accelerate", "diffusers", "trl", "peft"}


def test_it_works_without_torch_and_what_is_optional(tmp_path: Path) -> None:
    site = without(tmp_path / "site", "torch", "accelerate", "gguf", "peft")
    done = python("-m", "peftc", "doctor", front=site, alone=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error[") == 1 and "needs the package `torch`" in done.stderr
    assert "no; for `peftc[train]`" in done.stdout and "no; for `peftc[demo]`" in done.stdout
    assert "the real one is not installed" in done.stdout


def test_a_torch_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so: no such file')\n")
    done = python("-m", "peftc", "doctor", front=tmp_path)
    assert "torch cannot be imported: OSError: libcudart.so: no such file" in done.stdout, done.stderr


def test_a_plugin_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    broken = Registry([Claim("broken", "no.such.module", "peftc-broken", "1.0")], blocked=frozenset())
    monkeypatch.setattr("peftc.registry.manager.default_registry", lambda: broken)
    found = told(capsys, code=1)
    assert found["plugins"] == [
        {"peft_type": "BROKEN", "distribution": "peftc-broken", "version": "1.0", "state": "broken"}
    ]
    assert [d["code"] for d in found["diagnostics"]] == [rules.PLUGIN_BROKEN.code]


def test_accelerators_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from peftc.integrations import placement

    class Cards:
        @staticmethod
        def get_device_name(index: int) -> str:
            return f"card {index}"

    monkeypatch.setattr(placement, "infer_device", lambda: "cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Cards)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert placement.accelerators() == ["cuda: card 0", "cuda: card 1"]


# records of runs ------------------------------------------------------------------------------------------------------


def test_a_newer_run_takes_the_place_of_that_environments_older_one() -> None:
    text = with_run("[]", a_run(failed=2))
    text = with_run(text, a_run("oldest", "5.9.0"))
    text = with_run(text, a_run(passed=5))
    found = runs_from(text)
    assert [(run.environment, run.passed, run.failed) for run in found] == [("newest", 5, 0), ("oldest", 3, 0)]
    assert runs_from(with_run(text, a_run("oldest", "5.10.0")))[1].versions["transformers"] == "5.10.0"


def test_what_is_on_record_can_be_read() -> None:
    assert list(tried.runs()) == list(runs_from(record.FILE.read_text(encoding="utf-8")))


SUITE = "def test_good(): pass\ndef test_bad(): assert False\nimport pytest\n@pytest.mark.skip(reason='a reason')\ndef test_not(): pass\n"


@pytest.mark.parametrize(("words", "kept"), [([], True), (["-k", "good"], False), (["test_it.py"], False)])
def test_only_a_whole_run_is_recorded(words: list[str], kept: bool, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "tried.json").write_text("[]")
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = .\n")
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\nfrom tests import conftest, record\n"
        "from tests.conftest import pytest_addoption, pytest_terminal_summary\n"
        "record.write.__defaults__ = (Path(__file__).parent / 'tried.json',)\n"
    )
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c",
                  str(tmp_path / "pytest.ini"), "--record", "made-up", *words, folder=tmp_path)  # fmt: skip
    found = runs_from((tmp_path / "tried.json").read_text())
    assert bool(found) == kept, done.stdout + done.stderr
    if kept:
        assert (found[0].environment, found[0].passed, found[0].failed, found[0].skipped) == ("made-up", 1, 1, 1)
        assert found[0].versions["torch"] == version("torch").partition("+")[0]
    else:
        assert "Not recorded" in done.stdout
