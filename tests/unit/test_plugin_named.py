"""An adapter's folder names the distribution of its method; without it, what to install is said in every way of reading."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc import rules
from peftc.cli.main import main
from peftc.config import files
from peftc.config.base import CONFIG_NAME, PeftConfig
from peftc.config.files import plugin_named, read_config, read_options
from peftc.diagnostics import PeftcError, PeftcWarning
from peftc.registry import origin
from peftc.registry.manager import Claim, Registry
from tests.defects import put_defect
from tests.unit import fakes
from tests.unit.fakes import FakeConfig

Patch = pytest.MonkeyPatch
ABSENT = "peftc-absent==2.1"


def registry_of(*claims: Claim) -> Registry:
    """A registry with the fake method, which these distributions claim."""
    made = Registry(claims, blocked=frozenset())
    if claims:
        made.register(fakes.plugin(fakes.record()), "fake")
    return made


def use(monkeypatch: Patch, *claims: Claim) -> None:
    made = registry_of(*claims)
    monkeypatch.setattr(files, "default_registry", lambda: made)


def installed(version: str, distribution: str = "peftc-fake") -> Claim:
    return Claim("fake", "fake_module", distribution, version)


def folder_with(place: Path, **options: Any) -> Path:
    """An adapter's folder with a config as it stands in a file."""
    (place / CONFIG_NAME).write_text(json.dumps({"peft_type": "FAKE", **options}))
    return place


def test_a_saved_config_names_distribution_and_version(tmp_path: Path, monkeypatch: Patch) -> None:
    use(monkeypatch, installed("1.2"))
    FakeConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["peftc_plugin"] == "peftc-fake==1.2"
    assert plugin_named(tmp_path / CONFIG_NAME) == "peftc-fake==1.2"
    assert read_config(tmp_path) == FakeConfig()
    assert FakeConfig(**read_options(tmp_path / CONFIG_NAME)) == FakeConfig()


@pytest.mark.parametrize("claim", [installed("0.1.0", "peftc"), installed("1 --pre", "x"), None])
def test_nothing_is_named_that_pip_has_no_use_for(tmp_path: Path, monkeypatch: Patch, claim: Claim | None) -> None:
    use(monkeypatch, *([claim] if claim else []))
    FakeConfig().save_pretrained(tmp_path)
    assert "peftc_plugin" not in json.loads((tmp_path / CONFIG_NAME).read_text())


WAYS: dict[str, Callable[[Path], object]] = {
    "read_config": read_config,
    "from_pretrained": PeftConfig.from_pretrained,
    "from_peft_type": lambda place: PeftConfig.from_peft_type(**json.loads((place / CONFIG_NAME).read_text())),
}


@pytest.mark.parametrize("way", WAYS)
def test_without_the_plugin_it_is_said_what_to_install(tmp_path: Path, way: str) -> None:
    with pytest.raises(PeftcError) as caught:
        WAYS[way](folder_with(tmp_path, peftc_plugin=ABSENT))
    (problem,) = caught.value.diagnostics
    assert problem.code == rules.PLUGIN_MISSING.code
    assert "pip install peftc-absent==2.1" in problem.fix
    assert "`peftc-absent`, which is not installed" in problem.what


def test_a_version_without_the_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match=r"`pytest` 999; installed is \d.*, without it"):
        read_config(folder_with(tmp_path, peftc_plugin="pytest==999"))


@pytest.mark.parametrize("named", ["evil; rm -rf ~", "--index-url=x==1", "a==1 b", "a", 3, None])
def test_what_is_no_requirement_is_never_told_as_a_command(tmp_path: Path, named: object) -> None:
    with pytest.raises(PeftcError) as caught:
        read_config(folder_with(tmp_path, peftc_plugin=named))
    assert [d.code for d in caught.value.diagnostics] == [rules.UNKNOWN_TYPE.code]
    assert str(named) not in str(caught.value) or named in ("a", 3)


@pytest.mark.parametrize(
    ("present", "warned"),
    [(installed("1.2"), False), (installed("2.0"), False), (installed("1.1"), True), (installed("1.2", "other"), True)],
)
def test_only_an_earlier_version_is_warned_of(tmp_path: Path, monkeypatch: Patch, present: Claim, warned: bool) -> None:
    use(monkeypatch, present)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_config(folder_with(tmp_path, peftc_plugin="Peftc_Fake==1.2"))
    codes = [w.message.diagnostic.code for w in told if isinstance(w.message, PeftcWarning)]
    assert codes == [rules.PLUGIN_OUTDATED.code] * warned


def test_the_tests_of_both_rules_can_fail(tmp_path: Path, monkeypatch: Patch) -> None:
    put_defect(monkeypatch, files, "found = origin.missing(name, plugin)", "pass")
    with pytest.raises(AssertionError):
        test_without_the_plugin_it_is_said_what_to_install(tmp_path, "read_config")
    put_defect(monkeypatch, origin, "present is None or not _is_behind(present, requirement)", "True")
    with pytest.raises(AssertionError):
        test_only_an_earlier_version_is_warned_of(tmp_path, monkeypatch, installed("1.1"), True)


def test_commands_say_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(folder_with(tmp_path, peftc_plugin=ABSENT, base_model_name_or_path="base"))
    for words in (["inspect", folder], ["plan", folder], ["merge", "--adapter", folder, "-o", str(tmp_path / "out")]):
        assert main(words) == 1
        assert f"pip install {ABSENT}" in capsys.readouterr().err, words
    assert main(["inspect", folder, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["plugin"] == ABSENT


def test_naming_plugins_needs_no_torch() -> None:
    code = "import sys, peftc.config.files; print({'torch', 'transformers', 'safetensors'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
