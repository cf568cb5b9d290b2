"""The disk cache: built once, also by several processes at a time; damage and refused writes cost time, never a result."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftc.cli.main import main
from peftc.diagnostics import PeftcError, PeftcWarning
from peftc.graph import cache as cache_module
from peftc.graph.base_ref import BaseRef
from peftc.graph.cache import GraphCache, default_folder, key_of
from peftc.graph.locate import LocatedBase
from peftc.graph.nodes import Kind, LayerFacts, ModelFacts, ModuleGraph, ModuleNode
from peftc.graph.tensors import TensorFacts

WEIGHT = TensorFacts((2, 3), "float32")
GRAPH = ModuleGraph(
    ModelFacts("Net", "net"), (ModuleNode("", LayerFacts(Kind.LINEAR, "Linear", 3, 2, params=(("weight", WEIGHT),))),)
)


class Builder:
    """Gives the graph and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> ModuleGraph:
        self.calls += 1
        return GRAPH


def cached_file(folder: Path) -> Path:
    (path,) = (folder / "graphs").glob("*.graph.json")
    return path


def test_a_graph_is_built_once(tmp_path: Path) -> None:
    build = Builder()
    assert GraphCache(tmp_path).get_or_build("key", "a model", build) == GRAPH
    assert GraphCache(tmp_path).get_or_build("key", "a model", build) == GRAPH
    assert build.calls == 1
    assert GraphCache(tmp_path).get("other") is None


def test_every_truncation_and_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path)
    cache.get_or_build("key", "a model", lambda: GRAPH)
    path = cached_file(tmp_path)
    whole = path.read_bytes()
    body = whole.index(b"\n") + 1
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        assert cache.get("key") is None, size
    for at in range(body, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert cache.get("key") is None, at
    build = Builder()
    assert cache.get_or_build("key", "a model", build) == GRAPH
    assert build.calls == 1
    assert path.read_bytes() == whole


def test_a_graph_of_another_form_is_built_again(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path)
    cache.get_or_build("key", "a model", lambda: GRAPH)
    path = cached_file(tmp_path)
    body = b'{"version": 1}'
    header = {"label": "x", "sha256": __import__("hashlib").sha256(body).hexdigest()}
    path.write_bytes(json.dumps(header).encode() + b"\n" + body)
    assert cache.get("key") is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b"[" * 2000 + b"\n" + b"[" * 2000),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["brackets", "lines of brackets", "a pipe", "a folder"],
)
def test_what_stands_in_the_place_of_a_graph_costs_time_and_no_result(tmp_path: Path, harm: Any) -> None:
    cache = GraphCache(tmp_path)
    cache.get_or_build("key", "a model", lambda: GRAPH)
    harm(cached_file(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftcWarning)  # that it cannot be kept
        assert cache.get_or_build("key", "a model", lambda: GRAPH) == GRAPH
    assert [entry.label for entry in cache.entries()] in ([], ["a model"])


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    with pytest.warns(PeftcWarning, match="PC307"):
        assert GraphCache(occupied).get_or_build("key", "a model", lambda: GRAPH) == GRAPH
    assert occupied.read_text() == "in the way"


def test_a_full_disk_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "replace_file", full)
    with pytest.warns(PeftcWarning, match="No space left"):
        assert GraphCache(tmp_path).get_or_build("key", "a model", lambda: GRAPH) == GRAPH
    assert not GraphCache(tmp_path).entries()


def _build_slowly(folder: Path, log: Path) -> None:
    def build() -> ModuleGraph:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return GRAPH

    assert GraphCache(folder).get_or_build("key", "a model", build) == GRAPH


def test_processes_at_a_time_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    workers = [context.Process(target=_build_slowly, args=(tmp_path, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "built\n"


def _die_while_building(folder: Path) -> None:
    GraphCache(folder).get_or_build("key", "a model", lambda: os._exit(9))  # type: ignore[arg-type, return-value]


def test_a_process_killed_while_building_blocks_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    victim = context.Process(target=_die_while_building, args=(tmp_path,))
    victim.start()
    victim.join(30)
    assert victim.exitcode == 9
    start = time.monotonic()
    assert GraphCache(tmp_path).get_or_build("key", "a model", lambda: GRAPH) == GRAPH
    assert time.monotonic() - start < 5


def test_a_lock_that_is_never_given_back_is_waited_for_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(handle: int) -> None:
        raise BlockingIOError

    monkeypatch.setattr(cache_module, "_lock", held)
    monkeypatch.setattr(cache_module, "PATIENCE", 0.2)
    assert GraphCache(tmp_path).get_or_build("key", "a model", lambda: GRAPH) == GRAPH


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache_module, "_lock", unsupported)
    assert GraphCache(tmp_path).get_or_build("key", "a model", lambda: GRAPH) == GRAPH
    assert GraphCache(tmp_path).get("key") == GRAPH


BASE = LocatedBase(BaseRef(config={"model_type": "x"}, task_type="CAUSAL_LM", dtype="float32"), "print", config={})


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, fingerprint="other"),
        replace(BASE, ref=replace(BASE.ref, task_type="SEQ_CLS")),
        replace(BASE, ref=replace(BASE.ref, task_type=None)),
        replace(BASE, ref=replace(BASE.ref, dtype="bfloat16")),
        replace(BASE, source="folder"),
    ],
    ids=["config", "task", "no task", "dtype", "weights"],
)
def test_the_key_depends_on_all_that_decides_the_graph(other: LocatedBase) -> None:
    assert key_of(other) != key_of(BASE)


@pytest.mark.parametrize("package", ["transformers", "torch"])
def test_the_key_depends_on_versions(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(BASE)
    real = cache_module.metadata.version
    monkeypatch.setattr(cache_module.metadata, "version", lambda name: "0" if name == package else real(name))
    assert key_of(BASE) != before


def test_the_key_does_not_depend_on_the_name() -> None:
    assert key_of(replace(BASE, ref=replace(BASE.ref, config="file.json"))) == key_of(BASE)


def test_without_transformers_a_diagnostic_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise cache_module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cache_module.metadata, "version", missing)
    with pytest.raises(PeftcError, match=r"PC305.*transformers"):
        key_of(BASE)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("PEFTC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "peftc"
    monkeypatch.setenv("PEFTC_CACHE", str(tmp_path / "named"))
    assert default_folder() == tmp_path / "named"


def test_the_command_lists_and_clears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEFTC_CACHE", str(tmp_path))
    assert main(["cache"]) == 0
    assert "0 graphs" in capsys.readouterr().err
    GraphCache().get_or_build("key", "owner/model CAUSAL_LM", lambda: GRAPH)
    (tmp_path / "graphs" / "bad.graph.json").write_bytes(b"\x00damaged")
    assert main(["cache", "list"]) == 0
    assert "owner/model CAUSAL_LM" in capsys.readouterr().out
    assert main(["cache", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {graph["label"] for graph in listed["graphs"]} == {"owner/model CAUSAL_LM", "damaged"}
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "graphs")
    assert main(["cache", "clear"]) == 0
    assert "Removed 2 graphs" in capsys.readouterr().err
    assert not list((tmp_path / "graphs").iterdir())
    assert main(["cache", "clear", "--quiet"]) == 0
