"""`adapter_config.json` in and out: found in a folder, file or hub cache, read leniently, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from peftc import rules
from peftc.config import files, hub
from peftc.config.base import CONFIG_NAME
from peftc.config.files import config_from_dict, read_config, write_config, write_text
from peftc.diagnostics import ConfigError, PeftcWarning, Where
from peftc.registry.manager import default_registry
from tests.unit.chosen import plain_method
from tests.unit.fakes import FakeConfig, registry

REGISTRY = default_registry()
METHOD = plain_method()


def saved(folder: Path, **changes: Any) -> Path:
    """A folder with the file of an installed method, changed."""
    config = METHOD.config(**(METHOD.examples[0] if METHOD.examples else {}))
    file = write_config(config, folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def from_dict(lenient: bool = False, **data: Any) -> tuple[Any, list[Any]]:
    return config_from_dict({"peft_type": "FAKE", **data}, lenient=lenient, registry=registry())


def test_a_config_is_read_from_a_folder_a_subfolder_or_a_file(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "b")
    config = read_config(tmp_path / "a" / "b")
    assert config == read_config(str(tmp_path / "a"), subfolder="b") == read_config(tmp_path / "a" / "b" / CONFIG_NAME)
    assert config == read_config(tmp_path / "a" / "b", revision="x", token="t", is_trainable=True, nothing=object())


def test_the_hub_is_asked_for_what_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    asked: list[Any] = []

    def fetch(repository: str, name: str, subfolder: str | None, options: Any) -> Path:
        asked.append((repository, name, subfolder, options))
        return tmp_path / name

    monkeypatch.setattr(hub, "fetch", fetch)
    read_config("owner/adapter", subfolder="s", revision="v1", r=3)
    assert asked == [("owner/adapter", CONFIG_NAME, "s", {"revision": "v1", "r": 3})]
    read_config(tmp_path)
    assert len(asked) == 1


def test_only_keywords_of_the_hub_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    given: list[Any] = []

    def download(*arguments: Any, **options: Any) -> str:
        given.append((arguments, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    options = {"revision": "v1", "token": None, "is_trainable": True, "local_files_only": True}
    assert hub.fetch("a/b", "f", None, options) == tmp_path
    assert given == [(("a/b", "f"), {"subfolder": None, "revision": "v1", "local_files_only": True})]


@pytest.mark.parametrize("name", ["a/b", "gpt2", "a-b.c/d_e"])
def test_names_of_repositories(name: str) -> None:
    assert hub.is_repository(name)


@pytest.mark.parametrize("name", ["./a", "/a/b", "~/a", "../a", "a/b/c", "", "a b", "a\0b"])
def test_what_is_no_name_of_a_repository(name: str) -> None:
    assert not hub.is_repository(name)


def test_unknown_keys_are_dropped_with_a_warning_each(tmp_path: Path) -> None:
    saved(tmp_path, later_option=3, another={"a": 1})
    with pytest.warns(PeftcWarning) as shown:
        config = read_config(tmp_path)
    (told,) = [w.message.diagnostic for w in shown]  # type: ignore[union-attr]  # one, however many they are
    assert told.code == rules.DROPPED_KEY.code
    assert "`later_option`" in told.what and "`another`" in told.what
    assert config == METHOD.config(**(METHOD.examples[0] if METHOD.examples else {}))


def test_a_warning_names_the_line_and_the_nearest_option(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": METHOD.peft_type, "inference_mod": True}, indent=2))
    with pytest.warns(PeftcWarning) as shown:
        read_config(tmp_path)
    (told,) = [w.message.diagnostic for w in shown]  # type: ignore[union-attr]
    assert (told.code, told.where.line) == (rules.DROPPED_KEY.code, 3)
    assert "Did you mean `inference_mode`?" in told.fix


def test_nested_unknown_keys_are_dropped_too() -> None:
    config, (told,) = from_dict(lenient=True, inner={"depth": 2, "later": 1})
    assert config == FakeConfig(inner={"depth": 2})
    assert (told.code, told.where.path) == (rules.DROPPED_KEY.code, "inner.later")


def test_a_run_config_is_dropped() -> None:
    config, (told,) = from_dict(lenient=True, runtime_config={"x": 1})
    assert config == FakeConfig()
    assert "describes a run" in told.what
    assert from_dict(lenient=True, runtime_config=None)[1] == []


def test_a_wrong_value_is_an_error_even_in_a_foreign_file() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(lenient=True, r="eight", later=1)
    assert [d.code for d in caught.value.diagnostics] == [rules.DROPPED_KEY.code, rules.BAD_VALUE.code]


def test_strict_data_has_no_unknown_key() -> None:
    with pytest.raises(ConfigError, match="no option `later`"):
        from_dict(later=1)
    assert from_dict(r=3)[0] == FakeConfig(r=3)


def test_the_place_of_the_data_is_told() -> None:
    where = Where(file="x.json", path="$.adapters.a")
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"peft_type": "FAKE", "r": 0}, lenient=False, where=where, registry=registry())
    assert str(caught.value.diagnostics[0].where) == "x.json at `$.adapters.a.r`"


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ([], rules.WRONG_DOCUMENT),
        ({}, rules.MISSING_KEY),
        ({"peft_type": 3}, rules.BAD_VALUE),
        ({"peft_type": None}, rules.BAD_VALUE),
        ({"peft_type": "fake"}, rules.UNKNOWN_TYPE),
    ],
)
def test_without_a_known_type_there_is_no_config(data: Any, rule: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(data, lenient=True, registry=registry())
    assert [d.code for d in caught.value.diagnostics] == [rule.code]


def test_a_misspelt_type_key_is_recognised() -> None:
    with pytest.raises(ConfigError, match="`peft_typ` may be meant"):
        config_from_dict({"peft_typ": "FAKE"}, lenient=True, registry=registry())


def test_nothing_that_a_file_names_is_imported(tmp_path: Path) -> None:
    mapping = {"base_model_class": "x", "parent_library": "no_such_library_at_all"}
    assert read_config(saved(tmp_path, auto_mapping=mapping)).auto_mapping == mapping


# writing -------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(FakeConfig(r=1), tmp_path)
    seen: list[Any] = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        seen.append((json.loads(Path(target).read_text())["r"], json.loads(Path(source).read_text())["r"]))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", watched)
    write_config(FakeConfig(r=2), tmp_path)
    assert seen == [(1, 2)]
    assert [p.name for p in tmp_path.iterdir()] == [CONFIG_NAME]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    file = tmp_path / "f.json"
    file.write_text("old")

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(failure):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_permissions_are_those_of_an_ordinary_write(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "ours").chmod(0o640)
    write_text(tmp_path / "ours", "y")
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o640


def test_the_run_config_is_never_written(tmp_path: Path) -> None:
    for name in REGISTRY.names:
        file = write_config(REGISTRY.get(name).least(), tmp_path / name)
        assert "runtime_config" not in json.loads(file.read_text())
