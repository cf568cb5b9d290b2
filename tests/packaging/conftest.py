"""Peftc's wheel, and a fresh environment that it is installed in."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT
from tests.packaging.fresh import build_wheel, install

SOURCES = ["peftc", "plugins", "schemas", "examples", "pyproject.toml", "setup.py", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources with this environment's setuptools; nothing is downloaded."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "plugins" / "folder_method" / "parts").mkdir(parents=True)
    (copy / "plugins" / "folder_method" / "__init__.py").touch()
    (copy / "plugins" / "folder_method" / "parts" / "__init__.py").touch()
    return build_wheel(copy, out)


@pytest.fixture(scope="module")
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
