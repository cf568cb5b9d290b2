"""A module graph as bytes: what `peftc graph --out` writes, and what the cache keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from uuid import uuid4

from peftc.graph.nodes import ModuleGraph
from peftc.limits import MAX_GRAPH


def write_graph(graph: ModuleGraph, path: Path) -> None:
    """Write a graph, whole or not at all. Raises `OSError`."""
    replace_file(path, json.dumps(graph.to_json(), separators=(",", ":")).encode() + b"\n")


def graph_from_text(text: bytes) -> ModuleGraph:
    """A graph from the bytes of its JSON form. Raises `ValueError` on anything else."""
    if len(text) > MAX_GRAPH:
        raise ValueError(f"{len(text):,} bytes, more than {MAX_GRAPH:,}")
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
