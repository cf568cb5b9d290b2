"""Environments that are made up: what is installed is decided by a folder in front of, or in place of, the real one.

A release is a `dist-info` with a version, which is all that metadata are; a package that is missing is one that the folder
in place of `site-packages` has no link to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def release(folder: Path, name: str, version: str, *lines: str) -> Path:
    """Make the folder say that this release is installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]))
    return folder


def without(folder: Path, *packages: str) -> Path:
    """A folder with links to everything that is installed here but these packages."""
    folder.mkdir()
    for place in reversed([Path(p) for p in sys.path if p and Path(p).name == "site-packages"]):
        for found in place.iterdir():
            name = found.name.partition("-")[0]
            link = folder / found.name
            if name not in packages and found.suffix != ".pth" and not name.startswith("__editable__"):
                link.unlink(missing_ok=True)
                link.symlink_to(found)
    (folder / "peftc_plugins").symlink_to(ROOT / "plugins")
    return folder


def python(
    *words: str, front: Path | None = None, alone: bool = False, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with a folder in front of its path; `alone`: with no other packages than those in it."""
    path = os.pathsep.join(map(str, [*([front] if front else []), ROOT]))
    environment = {**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *(["-S"] if alone else []), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
