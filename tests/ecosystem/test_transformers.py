"""transformers and accelerate, unmodified, give the same losses and the same files with peftc as with the reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ecosystem.both import differences, file_differences, run_both


@pytest.mark.parametrize("script", ["transformers_trainers.py"])
def test_a_program_does_the_same_with_the_alias(script: str, tmp_path: Path) -> None:
    both = run_both(script, tmp_path)
    found = [*differences(*both.results()), *file_differences(both)]
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:40])
