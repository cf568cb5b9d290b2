"""The record of the reference's own tests: complete, explained and not below what was promised; samples are what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.peer_suite.causes import TO_COME, UNEXPLAINED, cause_of, causes
from benchmarks.peer_suite.record import BASELINE, PASSED, RECORD, now, read, write
from benchmarks.peer_suite.sample import sample

#: Of the tests that need only what exists and that the reference passes, how many pass here.
PROMISED = 0.97

TABLE = causes()
PASSING = {test for test, state in read(BASELINE).states.items() if state == PASSED}
STATES = read(RECORD).states
of_all = pytest.mark.skipif(set(STATES) != PASSING, reason="the record is of some tests; `make peer-suite` runs all")


def test_what_is_on_record_passes_on_the_reference() -> None:
    assert set(STATES) <= PASSING


def test_every_other_one_has_its_reason() -> None:
    assert [test for test, state in STATES.items() if state not in TABLE and state != PASSED] == []
    assert UNEXPLAINED not in TABLE


@of_all
def test_no_reason_explains_nothing() -> None:
    assert set(TABLE) - set(STATES.values()) == set()


@of_all
def test_as_many_pass_as_was_promised() -> None:
    existing = [state for state in STATES.values() if state == PASSED or TABLE[state].verdict != TO_COME]
    assert existing.count(PASSED) / len(existing) >= PROMISED


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    states = {"a.py::one[x-1]": "passed", "a.py::one[y[2]]": "why", "a.py::two": "passed", "b.py::C::one[x-1]": "other"}
    write(now(states), tmp_path / "record")
    assert read(tmp_path / "record").states == states
    first = (tmp_path / "record").read_bytes()
    write(now(dict(reversed(states.items()))), tmp_path / "record")
    assert (tmp_path / "record").read_bytes() == first


def test_a_sample_has_some_of_every_kind_and_is_the_same_each_time() -> None:
    tests = [f"{file}.py::test[{config}Config-{number}]" for file in "ab" for config in "XYZ" for number in range(50)]
    tests += ["c.py::One::test", "c.py::Two::test"]
    found = sample(tests, 100)
    assert len(found) == len(set(found)) == 100 and set(found) <= set(tests)
    assert found == sample(reversed(tests), 100)
    kinds = Counter(test.partition("-")[0] for test in found)
    assert len(kinds) == 8 and max(kinds.values()) <= 18
    assert sample(tests, 1000) == sorted(tests)


def test_the_first_row_that_fits_is_the_cause() -> None:
    rows = list(TABLE.values())
    assert cause_of("nothing that a row is about", rows) == UNEXPLAINED
    for row in rows:
        assert row.title and row.why.endswith(".")


def test_a_row_of_no_verdict_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "causes.toml"
    file.write_text('[a]\nverdict = "nobody"\ntitle = "a"\nwhy = "b"\nmatch = ["c"]\n', encoding="utf-8")
    with pytest.raises(ValueError, match="a needs"):
        causes(file)


def test_ci_runs_a_sample(root: Path) -> None:
    assert 'run peer-suite ARGS="--sample 250"' in (root / ".ci" / "run").read_text(encoding="utf-8")
