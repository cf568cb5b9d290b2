"""The program in the documentation does the same with the alias as with the real `peft`; the page names what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from peftc import compat
from peftc.compat import names

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "examples/drop_in/train.py"
PAGE = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")


def output(*words: str) -> list[str]:
    """What a program prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_the_program_of_the_page_does_the_same_with_both(tmp_path: Path) -> None:
    real = output(PROGRAM, str(tmp_path / "real"))
    alias = output("-m", "peftc", "run", PROGRAM, str(tmp_path / "alias"))
    assert real[:-1] == alias[:-1]
    assert real[-1].replace("0.21.2", compat.VERSION) == alias[-1]
    assert all(line in PAGE for line in alias)


def test_the_page_names_every_module() -> None:
    assert set(names.table()) <= set(re.findall(r"`(peft[\w.]*)`", PAGE))
