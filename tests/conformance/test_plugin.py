"""The kit as a plugin's author meets it: one call in a test file, and pytest finds the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: A whole test file; the plugin that it tests is not installed.
TEST_FILE = """
from peftc.testing import conformance
from tests.mutation import mutants

test_conformance = conformance(mutants)
"""


def run_pytest(folder: Path, plugin: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(TEST_FILE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PEFTC_TEST_MUTANT": plugin}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "test_mine.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_one_call_is_a_whole_test_file(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, "starts_somewhere", "-k", "(starts_as_declared or acts_when_trained) and mlp")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 1 passed" in run.stdout
    assert "The output of a fresh adapter is not the base's" in run.stdout
    assert "test_conformance[MUTANT-starts_as_declared-no-options-mlp]" in run.stdout


def test_a_plugin_that_cannot_be_loaded_is_an_error_of_collection(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, "no_such_plugin", "--collect-only")
    assert run.returncode != 0
    assert "no_such_plugin" in run.stdout


def test_pytest_loads_no_torch_for_the_kit() -> None:
    code = "import sys, peftc.testing.plugin, peftc.testing; print({'torch', 'peftc.testing.kit'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "set()", run.stderr
