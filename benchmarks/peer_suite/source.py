"""Where the reference's tests come from: its source distribution, fetched by pip once for each environment."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.21.2"
_SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
_NAME = f"peft-{VERSION}"

#: Below the environment, so that it goes when that goes.
FOLDER = Path(sys.prefix) / "peer-suite"
#: Nothing in these runs without an accelerator or another package for quantisation.
ACCELERATOR = frozenset({"test_common_gpu.py", "test_gpu_examples.py", "test_gptqmodel.py", "test_torch_compile.py"})


class UnreachableError(Exception):
    """The source distribution cannot be fetched; the message says why."""


def suite() -> Path:
    """The folder with the reference's `tests/`, fetched if it is not there. Raises `UnreachableError`."""
    target = FOLDER / _NAME
    if not target.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            _unpack(_fetched(Path(scratch)), Path(scratch))
            shutil.move(Path(scratch, _NAME), target)
    return target


def _fetched(folder: Path) -> Path:
    wanted = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", f"peft=={VERSION}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *wanted]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / f"{_NAME}.tar.gz"
    if run.returncode != 0 or not archive.is_file():
        said = run.stderr.strip().splitlines() or ["pip says nothing"]
        raise UnreachableError(f"pip cannot fetch the source distribution of peft {VERSION}: {said[-1]}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != _SHA256:
        raise ValueError(f"{archive.name} is another file than the one that these numbers are about: sha256 {found}")
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    # not in the distribution; without it the files of tests cannot import each other
    (folder / _NAME / "tests" / "__init__.py").touch()
