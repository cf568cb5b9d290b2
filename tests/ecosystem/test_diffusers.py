"""diffusers with the alias: same images, same parameter names, same files as with the real library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ecosystem.both import Both, differences, file_differences, run_both

SECTIONS = ["train", "load", "part", "plain", "fuse", "hotswap", "layerwise_casting", "refused"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    yield run_both("diffusers_pipeline.py", tmp_path_factory.mktemp("diffusers"))


@pytest.mark.parametrize("section", SECTIONS)
def test_results_are_the_same(both: Both, section: str) -> None:
    real, alias = both.results()
    assert not list(differences(real[section], alias[section]))


def test_files_are_the_same(both: Both) -> None:
    assert not [found for found in file_differences(both) if not found.startswith("results.json")]


def test_the_script_tells_something(both: Both) -> None:
    """Images that differ where they should, and are the same where an adapter was taken out again."""
    real, _ = both.results()
    assert set(real) == set(SECTIONS)
    load = real["load"]
    images = [load[name] for name in ("base", "first", "second", "scaled", "two", "by block")]
    assert len({tuple(image) for image in images}) == len(images)
    assert load["unloaded"][0] == load["off"] == load["base"]
    assert real["hotswap"]["in place"]
