"""Jobs of two processes: the same losses as with the real library in each, and the same files, tensor by tensor.

Each library runs all rows in one job. What the reference cannot do in a way is compared with what it does in another.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from peftc import rules
from tests.ecosystem.both import Both, differences, file_differences, files
from tests.ecosystem.ranks import RANKS, run_jobs

ADAPTERS = ["lora", "head", "ia3", "vera"]
NO_DEEPSPEED = (
    "DeepSpeed is not among the tests' requirements, as it comes without a wheel: pip install deepspeed==0.19.8"
)
SHARDED = pytest.mark.skipif(find_spec("deepspeed") is None, reason=NO_DEEPSPEED)
WAYS = ["ddp", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-leaves", "zero3"]
HELD = ["fsdp1", "fsdp1-flat", "fsdp2", pytest.param("zero3", marks=SHARDED)]
#: FSDP1 without the original parameters takes no trainable ones beside frozen ones, which is what these methods have
IMPOSSIBLE = {("fsdp1-flat", "ia3"), ("fsdp1-flat", "vera")}
ROWS = [
    pytest.param(way, adapter, id=f"{way}-{adapter}", marks=SHARDED if way == "zero3" else ())
    for way in WAYS
    for adapter in ADAPTERS
    if (way, adapter) not in IMPOSSIBLE
]
EACH = pytest.mark.parametrize(("way", "adapter"), ROWS)
#: those of FSDP1
FLATTENED = pytest.mark.parametrize(("way", "adapter"), [row for row in ROWS if str(row.id).startswith("fsdp1")])
#: of two orders of adding the same numbers in float32
TOLERANCE = 2e-6

ELSEWHERE, BESIDE, GONE = rules.WEIGHT_ELSEWHERE.code, rules.BESIDE_SHARDS.code, rules.MODEL_DRIFTED.code
#: what is asked of a model in shards outside of its calls, and what is said; nothing where it is done
ALWAYS = {name: [ELSEWHERE] for name in ("merge", "merge_layer", "merge_and_unload", "combine", "convert", "save")}
SAID = {
    "fsdp1": {**ALWAYS, "read": [ELSEWHERE], "write": [ELSEWHERE], "add": [ELSEWHERE], "unload": [GONE]},
    "fsdp1-flat": {**ALWAYS, "read": [ELSEWHERE], "write": [ELSEWHERE], "add": [ELSEWHERE], "unload": [GONE]},
    "fsdp2": {**ALWAYS, "read": [], "write": [], "add": [BESIDE], "unload": []},
    "zero3": {**ALWAYS, "read": [ELSEWHERE], "write": [ELSEWHERE], "add": [BESIDE], "unload": []},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    yield run_jobs("distributed_jobs.py", tmp_path_factory.mktemp("distributed"))


def of_rank(both: Both, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    real, alias = both.results(f"results-{rank}.json")
    return real, alias


def able(way: str, adapter: str) -> str:
    """The way in which the reference does that: shards of what it reads without a call mean nothing to it."""
    return "fsdp2" if way == "fsdp2-leaves" and adapter in ("ia3", "vera") else way


@pytest.mark.parametrize("rank", range(RANKS))
@EACH
def test_losses_are_the_same(both: Both, way: str, adapter: str, rank: int) -> None:
    real, alias = of_rank(both, rank)
    ours, theirs = alias[f"{way}-{adapter}"], real[f"{able(way, adapter)}-{adapter}"]
    assert "error" not in ours, ours["error"]
    assert len(set(ours["losses"])) == 3
    assert not list(differences(theirs["losses"], ours["losses"], tolerance=TOLERANCE))


@EACH
def test_files_are_the_same(both: Both, way: str, adapter: str) -> None:
    """Where the reference saves nothing, with FSDP1, they are those of its job without shards."""
    other = "ddp" if way.startswith("fsdp1") else able(way, adapter)
    pair = Both(both.real / f"{other}-{adapter}", both.alias / f"{way}-{adapter}")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files(pair.alias)
    assert not list(file_differences(pair, tolerance=TOLERANCE))


@pytest.mark.parametrize("rank", range(RANKS))
@EACH
def test_what_was_saved_acts_when_it_is_loaded(both: Both, way: str, adapter: str, rank: int) -> None:
    real, alias = of_rank(both, rank)
    wanted = real[f"{'zero3' if way == 'zero3' else 'ddp'}-{adapter}"]["reloaded"]["loss"]
    found = alias[f"{way}-{adapter}"]["reloaded"]
    assert found["loss"] == pytest.approx(wanted, abs=TOLERANCE)
    assert found["warned"] == []


@FLATTENED
def test_the_state_dict_of_fsdp_is_found_by_both_ways_to_ask(both: Both, way: str, adapter: str) -> None:
    """From what FSDP gathers, and by asking its wrapper; the reference looks for names that FSDP has cleaned."""
    for rank in range(RANKS):
        real, alias = of_rank(both, rank)
        ours = alias[f"{way}-{adapter}"]
        assert ours["found"] == ours["asked"] != {}
        assert set(real[f"{way}-{adapter}"]["found"]) < set(ours["found"])


@pytest.mark.parametrize("way", HELD)
def test_outside_of_calls_all_is_done_or_refused_by_name(both: Both, way: str) -> None:
    for rank in range(RANKS):
        found = of_rank(both, rank)[1][f"outside-{way}"]
        assert "error" not in found, found["error"]
        told = SAID[way] if rank == 0 else {**SAID[way], "save": []}  # the one that writes
        assert {name: found[name]["said"] for name in told} == told
        assert [name for name in SAID[way] if not found[name]["same"]] == []
