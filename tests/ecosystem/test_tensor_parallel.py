"""Adapters on a base whose weights transformers splits between two processes: all is as on the whole base, or refused by name.

The base has biases, and sizes of which one process has more than the other. The reference's job runs a few of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from peftc import rules
from tests.ecosystem.both import Both, differences, file_differences, files
from tests.ecosystem.ranks import RANKS, run_jobs

ROWS = [
    "columns", "rows", "all", "drops", "dora", "ia3", "vera", "hra", "oft", "boft", "loha", "lokr", "fourier", "adalora",
    "hira", "norms", "tokens", "prompt", "sampled",
]  # fmt: skip
#: of two orders of adding the same numbers in float32
TOLERANCE = 2e-6
#: AdamW makes a step of a gradient however small, and of what differs in it
OF_STEPS = 3e-5
#: the same for sums of gradients, as a part of them: FourierFT's are sums over whole weights
OF_GRADIENTS = 3e-5
#: what is said of what cannot be done, and what is named
REFUSED = {
    "head": (rules.SPLIT_BASE, "`lm_head`"),
    "prefix": (rules.SPLIT_BASE, "PREFIX_TUNING"),
    "around": (rules.SPLIT_BASE, "`model.layers.1.self_attn`"),
    "biases": (rules.SPLIT_BASE, "self_attn.o_proj"),
    "start": (rules.WEIGHT_ELSEWHERE, "its start changes the base weight"),
}
#: what merging says: of adapters on layers that are whole nothing, of prompts that they are no weights
MERGE = {"norms": [], "prompt": [rules.CANNOT_MERGE.code], "sampled": [rules.CANNOT_MERGE.code]}

EACH = pytest.mark.parametrize("row", ROWS)
ON_BOTH = pytest.mark.parametrize("rank", range(RANKS))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    yield run_jobs("tensor_parallel_jobs.py", tmp_path_factory.mktemp("tensor_parallel"))


def ours(both: Both, rank: int, row: str) -> dict[str, Any]:
    found: dict[str, Any] = both.results(f"results-{rank}.json")[1][row]
    assert "error" not in found, found["error"]
    return found


@ON_BOTH
@EACH
def test_all_processes_begin_with_the_same_numbers(both: Both, row: str, rank: int) -> None:
    found = ours(both, rank, row)
    assert found["split"]["begun"] == found["whole"]["begun"] != {}


@ON_BOTH
@EACH
def test_losses_and_gradients_are_those_on_the_whole_base(both: Both, row: str, rank: int) -> None:
    whole, split = (ours(both, rank, row)[kind] for kind in ("whole", "split"))
    assert len(set(split["losses"])) == 4
    for of in ("losses", "now", "disabled", "generated"):
        assert not list(differences(whole[of], split[of], tolerance=TOLERANCE)), of
    assert split["gradients"] == pytest.approx(whole["gradients"], rel=OF_GRADIENTS, abs=TOLERANCE)


@EACH
def test_processes_stay_together(both: Both, row: str) -> None:
    """To the last bit, as each takes its steps by itself."""
    first, second = (ours(both, rank, row)["split"] for rank in range(RANKS))
    assert first == second


@EACH
def test_files_have_whole_tensors(both: Both, row: str) -> None:
    pair = Both(both.alias / f"{row}-whole", both.alias / f"{row}-split")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files(pair.alias)
    assert not list(file_differences(pair, tolerance=OF_STEPS))


@EACH
def test_what_was_saved_is_loaded_onto_a_split_base(both: Both, row: str) -> None:
    split = ours(both, 0, row)["split"]
    assert split["reloaded"] == pytest.approx(split["now"], abs=TOLERANCE)
    assert split["warned"] == []


@EACH
def test_a_split_weight_is_not_merged_into(both: Both, row: str) -> None:
    found = ours(both, 0, row)
    assert [text.split()[0] for text in found["merge"]] == MERGE.get(row, [rules.WEIGHT_ELSEWHERE.code])
    assert found["after"] == pytest.approx(found["split"]["now"], abs=TOLERANCE)


@ON_BOTH
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_act_on_a_part_is_refused_by_name(both: Both, name: str, rank: int) -> None:
    rule, named = REFUSED[name]
    found = ours(both, rank, f"refused-{name}")
    (text,) = found["said"]
    assert text.startswith(rule.code)
    assert named in text
    assert found["same"]


def test_a_plan_knows_what_each_process_holds(both: Both) -> None:
    """Of a whole model and of a split one."""
    shares = [ours(both, rank, "share") for rank in range(RANKS)]
    assert [share["planned"] for share in shares] == [[max(share["held"] for share in shares)] * 2] * RANKS


def test_what_the_reference_does(both: Both) -> None:
    """It splits thin factors, on layers split by columns alone, and merges there no more than we do."""
    real = both.results("results-0.json")[0]
    whole, split = (real["columns"][kind] for kind in ("whole", "split"))
    assert not list(differences(whole["losses"], split["losses"], tolerance=TOLERANCE))
    assert "DTensor" in real["columns"]["merge"][0]
    assert "is invalid for input of size" in real["rows"]["error"]
    assert "must match the size of tensor" in real["ia3"]["error"]
    assert "got mixed torch.Tensor and DTensor" in real["dora"]["error"]
