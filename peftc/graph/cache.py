"""Module graphs kept on disk, so that the second plan of a model needs neither torch nor transformers.

One file per graph, named by a hash of all that the graph depends on; replaced atomically, checked when read, and rebuilt
when damaged. `PEFTC_CACHE` names another folder. What cannot be cached still works, with a warning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from peftc import rules
from peftc._version import VERSION
from peftc.diagnostics import PeftcError, Where, warn
from peftc.graph import roles
from peftc.graph.files import graph_from_text, replace_file
from peftc.graph.locate import LocatedBase
from peftc.graph.nodes import GRAPH_VERSION, ModuleGraph
from peftc.graph.quantised import distributions_of, packed_config
from peftc.limits import MAX_GRAPH

#: Seconds to wait for another process that builds the same graph, before building it as well.
PATIENCE = 120.0

_SUFFIX = ".graph.json"
_HEADER_LIMIT = 4096


def default_folder() -> Path:
    """`PEFTC_CACHE`, or `peftc` in the platform's folder for caches."""
    named = os.environ.get("PEFTC_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "peftc"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "peftc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftc"


def key_of(base: LocatedBase, storages: Iterable[str] = ()) -> str:
    """Hash of all that a graph depends on: config, class wanted, dtype, the versions that build it, and for a quantised base the
    names of the storages that packed layers are known by.

    Raises `PeftcError` when transformers or torch is not installed.
    """
    parts = {
        "base": base.fingerprint,
        "weights": base.has_weights,
        "task_type": base.ref.task_type,
        "dtype": base.ref.dtype,
        **_quantised(base, storages),
        "versions": [VERSION, GRAPH_VERSION, roles.digest(), *(_version(name) for name in ("transformers", "torch"))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _quantised(base: LocatedBase, storages: Iterable[str]) -> dict[str, object]:
    """What the packed layers of a quantised base depend on besides its config."""
    config = packed_config(base) or base.ref.quantization
    if config is None:
        return {}
    versions = [_version(name) for name in distributions_of(config)]
    return {"quantization": base.ref.quantization, "packed_by": versions, "storages": sorted(storages)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached graph: its file, size in bytes, time of writing (seconds since the epoch) and what it is a graph of."""

    path: Path
    size: int
    written: float
    label: str


class GraphCache:
    """The cached graphs of one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or default_folder()) / "graphs"

    def get_or_build(self, key: str, label: str, build: Callable[[], ModuleGraph]) -> ModuleGraph:
        """The cached graph, or the built one, then kept under `key`. Processes asking for one key build it once."""
        found = self.get(key)
        if found is not None:
            return found
        with self._locked(key):
            found = self.get(key)  # another process may have built it meanwhile
            if found is None:
                found = build()
                self._put(key, label, found)
            return found

    def get(self, key: str) -> ModuleGraph | None:
        """The graph kept under `key`; None if there is none or its file is damaged."""
        try:
            path = self._path(key)
            if not path.is_file():  # nothing, or a pipe, which would be waited for
                return None
            with path.open("rb") as file:
                header, _, body = file.read(MAX_GRAPH + _HEADER_LIMIT).partition(b"\n")
            if json.loads(header)["sha256"] != hashlib.sha256(body).hexdigest():
                return None
            return graph_from_text(body)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def entries(self) -> list[Entry]:
        """All cached graphs, newest first."""
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):
                if not path.is_file():
                    continue
                stat = path.stat()
                found.append(Entry(path, stat.st_size, stat.st_mtime, _label(path)))
        return sorted(found, key=lambda entry: -entry.written)

    def clear(self) -> list[Entry]:
        """Remove all cached graphs; returns what was removed. Raises `OSError`."""
        removed = self.entries()
        for entry in removed:
            entry.path.unlink(missing_ok=True)
        for lock in self.folder.glob("*.lock"):
            lock.unlink(missing_ok=True)
        return removed

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _put(self, key: str, label: str, graph: ModuleGraph) -> None:
        body = json.dumps(graph.to_json(), separators=(",", ":")).encode()
        header = {"label": label[:200], "sha256": hashlib.sha256(body).hexdigest()}
        try:
            if self._path(key).exists() and not self._path(key).is_file():
                raise OSError(errno.EEXIST, "what is in its place is no file")
            replace_file(self._path(key), json.dumps(header).encode() + b"\n" + body)
        except OSError as error:
            what = f"The graph was not kept: {error.strerror or error}"
            fix = "Free some space, or let PEFTC_CACHE name a folder that can be written."
            warn([rules.CACHE_UNUSABLE(what, fix=fix, where=Where(file=str(self.folder)))])

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the key's lock while building. Without locking (read-only folder, odd file system) go on unlocked."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / f"{key}.lock").open("ab")
        except OSError:
            yield  # `_put` says why nothing can be kept
            return
        with file:
            _wait_for_lock(file.fileno())
            yield  # closing the file, or the end of the process, gives the lock back


def _wait_for_lock(handle: int) -> None:
    """Take the lock when it is free; give up waiting after `PATIENCE`, since locks only save double work."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            _lock(handle)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return
        else:
            return


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:  # held by another process
            raise BlockingIOError from error
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _label(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return str(json.loads(file.readline(_HEADER_LIMIT))["label"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "damaged"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        what = f"`{distribution}` is not installed; the model is built with it"
        raise PeftcError(rules.DEPENDENCY_MISSING(what, fix=f"Install it: `pip install {distribution}`.")) from error
