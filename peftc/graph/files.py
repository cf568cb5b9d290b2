"""A module graph as a JSON file: what `peftc graph --out` writes and `peftc plan --graph` reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from uuid import uuid4

from peftc import rules
from peftc.diagnostics import PeftcError, Where
from peftc.graph.nodes import GRAPH_VERSION, ModuleGraph


def write_graph(graph: ModuleGraph, path: Path) -> None:
    """Write a graph, whole or not at all. Raises `OSError`."""
    replace_file(path, json.dumps(graph.to_json(), separators=(",", ":")).encode() + b"\n")


def read_graph(path: Path) -> ModuleGraph:
    """Read a graph. Raises `PeftcError` when the file is missing or is not a graph of this version."""
    where = Where(file=str(path))
    try:
        text = path.read_bytes()
    except OSError as error:
        what = f"The file cannot be read: {error.strerror}"
        raise PeftcError(rules.GRAPH_INVALID(what, fix="Correct the path.", where=where, why="")) from error
    try:
        return graph_from_text(text)
    except ValueError as error:
        fix = f"Write it again with `peftc graph MODEL --out FILE` (graph version {GRAPH_VERSION})."
        raise PeftcError(rules.GRAPH_INVALID(f"Not a module graph: {error}", fix=fix, where=where)) from error


def graph_from_text(text: bytes) -> ModuleGraph:
    """A graph from the bytes of its JSON form. Raises `ValueError` on anything else."""
    try:
        return ModuleGraph.from_json(json.loads(text))
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Replace one file's content: a reader, or a crash, finds the old content or the new. Raises `OSError`.

    What is not a regular file (a pipe, `/dev/null`) is written to, not replaced.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    staged = path.with_name(f".{path.name}.{uuid4().hex[:12]}")
    try:
        staged.write_bytes(content)
        os.replace(staged, path)
    except BaseException:  # Ctrl-C too must not leave the staged file
        staged.unlink(missing_ok=True)
        raise
