"""The commands about documents: `validate`, `schema`, `methods`, `plugins`."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftc.cli.main import main
from peftc.cli.methods import type_of
from peftc.config.base import CONFIG_NAME
from peftc.registry import manager
from peftc.registry.manager import Registry, default_registry
from peftc.schema.generate import file_name, names
from tests.unit.chosen import plain_method
from tests.unit.fakes import claim, plugin, record

REGISTRY = default_registry()
TYPE = plain_method().peft_type
GOOD = f"version: 1\nbase: owner/model\nadapters:\n  default:\n    peft_type: {TYPE}\n"
BAD = GOOD + "    inference_mod: true\n    revision: 3\nchekcs: {}\n"

Captured = pytest.CaptureFixture[str]


def use(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    """Let commands see this registry."""
    monkeypatch.setattr(manager, "default_registry", lambda: registry)


def fake_registry(*claims: Any, blocked: frozenset[str] = frozenset()) -> Registry:
    made = Registry(claims, blocked=blocked)
    made.register(plugin(record()), "fake")
    return made


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(GOOD)
    return tmp_path / "spec.yaml"


# validate ------------------------------------------------------------------------------------------------------------


def test_a_good_spec_is_said_to_be_good(spec: Path, capsys: Captured) -> None:
    assert main(["validate", str(spec)]) == 0
    assert capsys.readouterr() == (f"ok  {spec}: a spec: default ({TYPE}) on owner/model\n", "")


def test_all_problems_of_all_files_are_shown(spec: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    assert main(["validate", str(tmp_path / "bad.yaml"), str(spec), str(tmp_path / "none.yaml")]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("ok  ") == 1
    assert shown.err.count("error[") == 4
    for place in ("bad.yaml:6:5", "bad.yaml:7:15", "bad.yaml:8:1", "none.yaml"):
        assert place in shown.err


def test_an_adapter_folder_is_checked_by_its_config(tmp_path: Path, capsys: Captured) -> None:
    REGISTRY.get(TYPE).config().save_pretrained(tmp_path)
    assert main(["validate", str(tmp_path)]) == 0
    assert f"a config of one {TYPE} adapter" in capsys.readouterr().out


def test_a_warning_does_not_fail(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": TYPE, "later": 1}))
    assert main(["validate", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "warning[PC122]" in shown.err
    assert "ok  " in shown.out


def test_quiet_says_nothing_about_what_is_good(spec: Path, capsys: Captured) -> None:
    assert main(["validate", "--quiet", str(spec)]) == 0
    assert capsys.readouterr() == ("", "")


def test_verdicts_as_json(spec: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    assert main(["validate", "--json", str(spec), str(tmp_path / "bad.yaml"), str(tmp_path / "none.yaml")]) == 1
    shown = capsys.readouterr()
    verdict = json.loads(shown.out)
    assert (shown.err, verdict["ok"]) == ("", False)
    assert [(f["kind"], f["ok"], len(f["diagnostics"])) for f in verdict["files"]] == [
        ("spec", True, 0),
        (None, False, 3),
        (None, False, 1),
    ]
    assert verdict["files"][1]["diagnostics"][0]["where"]["line"] == 6


def test_validating_costs_under_half_a_second_and_needs_no_torch(spec: Path) -> None:
    code = f"""
import sys
from peftc.cli.main import main
assert main(["validate", {str(spec)!r}]) == 0
assert not {{"torch", "transformers", "safetensors", "numpy", "huggingface_hub", "rich"}} & set(sys.modules)
"""
    costs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(costs) < 0.5


# schema --------------------------------------------------------------------------------------------------------------


def test_schemas_are_listed_and_printed(capsys: Captured) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out.split() == names(REGISTRY)
    assert main(["schema", TYPE]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["peft_type"]["const"] == TYPE
    assert main(["schema", "spec"]) == 0
    assert json.loads(capsys.readouterr().out)["title"].startswith("peftc spec")


def test_committed_schemas_are_up_to_date(capsys: Captured) -> None:
    assert main(["schema", "--check"]) == 0


def test_drift_is_shown_as_a_diff_with_the_command_that_mends_it(root: Path, tmp_path: Path, capsys: Captured) -> None:
    for name in names(REGISTRY):
        shutil.copy(root / "schemas" / file_name(name), tmp_path)
    file = tmp_path / file_name("spec")
    file.write_text(file.read_text().replace('"version"', '"versio"'))
    (tmp_path / file_name("plan")).unlink()
    (tmp_path / file_name("gone")).write_text("{}")
    assert main(["schema", "--check", "--dir", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert '-    "versio": {' in shown.out
    assert '+    "version": {' in shown.out
    assert shown.err.count("error[PC123]") == 3
    assert "Run `peftc schema --write --dir" in shown.err
    (tmp_path / file_name("gone")).unlink()
    assert main(["schema", "--write", "--dir", str(tmp_path)]) == 0
    assert main(["schema", "--check", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [f"wrote {tmp_path / file_name(n)}" for n in ("plan", "spec")]


def test_a_plugin_author_writes_the_schema_of_an_own_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    use(monkeypatch, fake_registry())
    assert main(["schema", "FAKE", "--write", "--dir", str(tmp_path / "new")]) == 0
    assert json.loads((tmp_path / "new" / "fake.schema.json").read_text())["properties"]["mode"]["enum"] == [
        "one",
        "two",
    ]
    assert main(["schema", "fake", "--check", "--dir", str(tmp_path / "new")]) == 0


def test_an_unknown_schema(capsys: Captured) -> None:
    assert main(["schema", "spek"]) == 1
    assert "Did you mean `spec`?" in capsys.readouterr().err


# methods -------------------------------------------------------------------------------------------------------------


def test_methods_are_listed_with_their_meaning(capsys: Captured) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    for name in REGISTRY.names:
        assert name in shown
        assert REGISTRY.get(name).summary in shown


@pytest.mark.parametrize("name", REGISTRY.names)
def test_a_method_shows_its_options(name: str, capsys: Captured) -> None:
    assert main(["methods", name.lower()]) == 0
    method, shown = REGISTRY.get(name), capsys.readouterr().out
    assert method.summary in " ".join(shown.split())
    assert method.paper in shown
    assert max(map(len, shown.splitlines())) <= 100
    first = [line.split()[0] for line in shown.splitlines() if line and not line.startswith(" ")]
    stored = [n for n, field in method.config.model_fields.items() if not field.exclude and n != "peft_type"]
    assert set(stored) <= set(first)


def own_options(name: str) -> set[str]:
    """Options that no base of the method's config has: those that stand in a file."""
    config = REGISTRY.get(name).config
    above = {option for base in config.__mro__[1:] for option in getattr(base, "model_fields", ())}
    return {n for n, field in config.model_fields.items() if n not in above and not field.exclude}


@pytest.mark.parametrize("name", [name for name in REGISTRY.names if own_options(name)])
def test_a_methods_own_options_come_first(name: str, capsys: Captured) -> None:
    main(["methods", name])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in lines if line and line[0] != " "]
    assert max(map(shown.index, own_options(name))) < shown.index("inference_mode")


def test_methods_as_json(capsys: Captured) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [m["peft_type"] for m in listed["methods"]] == list(REGISTRY.names)
    assert main(["methods", TYPE, "--json"]) == 0
    assert "inference_mode" in json.loads(capsys.readouterr().out)["options"]


def test_an_unknown_method_names_the_nearest(capsys: Captured) -> None:
    assert main(["methods", f"{TYPE}X"]) == 1
    assert f"Did you mean `{TYPE}`" in capsys.readouterr().err


def test_a_broken_plugin_is_reported_beside_the_others(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    use(monkeypatch, fake_registry(claim("broken", "no_such_module_at_all")))
    assert main(["methods"]) == 1
    shown = capsys.readouterr()
    assert "Nothing." in shown.out
    assert "error[PC202]" in shown.err


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"type": "integer", "minimum": 1}, "integer ≥ 1"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, "number > 0 ≤ 1.5"),
        ({"enum": ["a", "b"]}, "a | b"),
        ({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]}, "list of string or null"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "map to integer"),
        ({"$ref": "#/$defs/X"}, "x | y"),
        ({}, "any"),
    ],
)
def test_types_in_a_few_words(option: dict[str, Any], text: str) -> None:
    assert type_of(option, {"X": {"enum": ["x", "y"]}}) == text


# plugins -------------------------------------------------------------------------------------------------------------


def states(capsys: Captured) -> dict[str, str]:
    """Module -> state, as shown in both tables."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {words[1]: words[-1] for words in lines if words and words[-1] != "STATE"}


def test_plugins_are_listed_without_loading_them(capsys: Captured) -> None:
    code = "import sys; from peftc.cli.main import main; main(['plugins']); print('peftc_plugins' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "False"
    assert all(c.module in shown for c in REGISTRY.claims)


def test_every_bundled_plugin_loads(capsys: Captured) -> None:
    assert main(["plugins", "--check"]) == 0
    assert set(states(capsys).values()) == {"loads"}


def test_states_of_plugins(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    claims = [claim("broken", "no_such_a"), claim("hidden", "no_such_b"), claim("two", "x"), claim("two", "y")]
    use(monkeypatch, fake_registry(*claims, blocked=frozenset({"hidden"})))
    assert main(["plugins"]) == 1
    found = {module: state for module, state in states(capsys).items() if not module.startswith("peftc_plugins.")}
    assert found == {"no_such_a": "installed", "no_such_b": "blocked", "x": "conflict", "y": "conflict"}
    assert main(["plugins", "--check"]) == 1
    assert states(capsys)["no_such_a"] == "broken"


def test_problems_of_plugins_are_told_once(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    use(monkeypatch, fake_registry(claim("two", "x"), claim("two", "y")))
    assert main(["plugins", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [d["code"] for d in told["diagnostics"]] == ["PC203"]
    assert [p["distribution"] for p in told["plugins"]] == ["somebody 1.0", "somebody 1.0"]


@pytest.mark.parametrize(
    "arguments", [["methods"], ["methods", TYPE], ["plugins", "--check"], ["schema", "spec"], ["schema", "--check"]]
)
def test_commands_about_documents_need_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from peftc.cli.main import main
assert main({arguments!r}) == 0
assert not {{"torch", "transformers", "safetensors", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "PEFTC_BLOCK": ""})
