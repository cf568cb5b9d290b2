"""Peftc's wheel, and a fresh environment that it is installed in."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT
from tests.packaging.fresh import build_wheel, install

SOURCES = ["peftc", "plugins", "schemas", "examples", "pyproject.toml", "setup.py", "README.md", "LICENSE"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built once for all processes that run tests."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has its folder in one that is of all of them
        place = place.parent
    with (place / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return next((place / "wheel").glob("*.whl"), None) or _built(place)


def _built(place: Path) -> Path:
    """Built from a copy of the sources with this environment's setuptools; nothing is downloaded."""
    copy = place / "source"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "plugins" / "folder_method" / "parts").mkdir(parents=True)
    (copy / "plugins" / "folder_method" / "__init__.py").touch()
    (copy / "plugins" / "folder_method" / "parts" / "__init__.py").touch()
    return build_wheel(copy, place / "wheel")


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh environment with the wheel; other packages come from the running environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # Plain folders on the path: their packages are seen, their .pth files (our own editable install) are not.
    running = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    (site / "running_environment.pth").write_text("".join(f"{entry}\n" for entry in running), encoding="utf-8")
    install(wheel, folder / "bin")
    return folder / "bin"
