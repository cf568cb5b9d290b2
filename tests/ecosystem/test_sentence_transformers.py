"""sentence-transformers with the alias: same losses, same embeddings, same files as with the real library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ecosystem.both import Both, differences, file_differences, run_both

SECTIONS = ["in_place", "several", "wrapped"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    yield run_both("sentence_model.py", tmp_path_factory.mktemp("sentences"))


@pytest.mark.parametrize("section", SECTIONS)
def test_results_are_the_same(both: Both, section: str) -> None:
    real, alias = both.results()
    assert not list(differences(real[section], alias[section]))


@pytest.mark.parametrize("folder", ["start", "in_place", "in_place-run", "wrapped", "wrapped-run"])
def test_files_are_the_same(both: Both, folder: str) -> None:
    assert not list(file_differences(both, folder))


def test_the_script_tells_something(both: Both) -> None:
    """Training moves the embeddings; what is saved gives them again."""
    real, _ = both.results()
    in_place = real["in_place"]
    assert in_place["vectors"] != in_place["started"][0] != in_place["base"]
    assert in_place["loaded"][0] == pytest.approx(in_place["vectors"], abs=1e-6)
