"""Which repositories the stand-in has, and where one lies: as in the cache of `huggingface_hub`, so that it is read as one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

#: The main branch, where no revision is named.
MAIN = "main"

#: Writes the files of a repository into an empty folder; the second path is the whole hub, for what was written before.
Build = Callable[[Path, Path], None]

#: (name, revision) -> what writes it, in the order in which they can be written.
REPOS: dict[tuple[str, str], Build] = {}


def repo(*names: str, revision: str = MAIN) -> Callable[[Build], Build]:
    """Decorator: the function writes the repository of these names."""

    def register(build: Build) -> Build:
        REPOS.update(((name, revision), build) for name in names)
        return build

    return register


def home(hub: Path, name: str) -> Path:
    """The folder of a repository, with all its revisions."""
    return hub / f"models--{name.replace('/', '--')}"


def commit(name: str, revision: str) -> str:
    """What stands for the hash of the commit that the revision points to."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def snapshot(hub: Path, name: str, revision: str = MAIN) -> Path:
    """The folder with the files of a revision."""
    return home(hub, name) / "snapshots" / commit(name, revision)
