"""TRL with the alias: same losses, same trained numbers, same parameter names, same files as with the real library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ecosystem.both import TOLERANCE, Both, differences, file_differences, run_both

TRAINERS = [
    "sft_loaded",
    "sft_single",
    "sft_config",
    "sft_half",
    "dpo_reference_adapter",
    "dpo_base_as_reference",
    "grpo_reference_adapter",
    "grpo_config",
]
SECTIONS = [*TRAINERS, "weights_for_an_engine", "refused"]
FOLDERS = ["start", *TRAINERS, "sft_loaded-run", "sft_resumed"]
#: Steps of Adam are as large as the learning rate, whatever the gradients' rounding in bfloat16 or float32.
TOLERANCES = {"sft_half": 0.03, "sft_single": 1e-4}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    yield run_both("trl_trainers.py", tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize("section", SECTIONS)
def test_results_are_the_same(both: Both, section: str) -> None:
    real, alias = both.results()
    tolerance = TOLERANCES.get(section, TOLERANCE)
    assert not list(differences(real[section], alias[section], tolerance=tolerance))


@pytest.mark.parametrize("section", TOLERANCES)
def test_losses_of_the_same_numbers_are_the_same(both: Both, section: str) -> None:
    """Before the first step, the precision of training has no part in them."""
    real, alias = (results[section]["log"][0]["loss"] for results in both.results())
    assert alias == pytest.approx(real, abs=TOLERANCE)


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_the_same(both: Both, folder: str) -> None:
    assert not list(file_differences(both, folder, TOLERANCES.get(folder, TOLERANCE)))


def test_the_script_tells_something(both: Both) -> None:
    """Losses that move, a reference that is not the model, weights that are complete."""
    real, _ = both.results()
    assert set(real) == set(SECTIONS)
    for section in TRAINERS:
        log = real[section]["first"]["log"] if section == "sft_loaded" else real[section]["log"]
        assert len({entry["loss"] for entry in log if "loss" in entry}) == 3
    assert real["dpo_reference_adapter"]["adapters"][0] == ["default", "ref"]
    assert real["weights_for_an_engine"]["complete"] == []
