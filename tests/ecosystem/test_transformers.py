"""transformers and accelerate, unmodified, give the same losses and the same files with peftc as with the reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ecosystem.both import differences, file_differences, run_both

#: the base is a folder here, whose path the reference writes into the card
LOCAL = ("README.md.base_model: only with the real one", "README.md.tags: ['base_model:adapter:base', ")


@pytest.mark.parametrize("script", ["transformers_trainers.py", "transformers_models.py"])
def test_a_program_does_the_same_with_the_alias(script: str, tmp_path: Path) -> None:
    both = run_both(script, tmp_path)
    results = both.results()
    for folder in (both.real, both.alias):
        (folder / "results.json").unlink()
    rough = [found.pop("half", {}) for found in results]  # roundings of bfloat16 differ
    found = [*differences(*results), *differences(*rough, tolerance=0.02), *file_differences(both)]
    found = [difference for difference in found if not any(words in difference for words in LOCAL)]
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:40])
