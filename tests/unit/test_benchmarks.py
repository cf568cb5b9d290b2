"""The benchmark table's logic: what is compared, and when a verdict is given."""

from __future__ import annotations

import importlib

import pytest

from benchmarks.__main__ import main, page
from benchmarks.__main__ import measure as measure_row
from benchmarks.row import OURS, PEER, Row
from benchmarks.rows import NAMES
from benchmarks.table import Check, Reading, Samples, Target, Unit, Verdict, judge, line_of, markdown, summarise

AT_LEAST_20 = Target(20, at_least=True)
FASTER = Check("job", Reading(OURS, "job"), Reading(PEER, "job"), AT_LEAST_20)


def seconds(*values: float, metric: str = "job") -> list[dict[str, float]]:
    """Rounds in which CPU time was this, and wall time twice as long."""
    return [{f"{metric}_cpu": value, f"{metric}_wall": 2 * value} for value in values]


def test_a_summary_is_the_median_and_the_quartiles() -> None:
    summary = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (summary.median, summary.low, summary.high, summary.spread) == (3.0, 2.0, 4.0, 2.0)
    assert summarise([7.0]).spread == 0


@pytest.mark.parametrize(
    ("numbers", "target", "verdict"),
    [
        ([30, 31, 32], AT_LEAST_20, Verdict.REACHED),
        ([10, 11, 12], AT_LEAST_20, Verdict.MISSED),
        ([21, 25, 40], AT_LEAST_20, Verdict.NOT_SHOWN),  # quartiles 23 and 32.5, median only 5 above the target
        ([2, 19, 30], AT_LEAST_20, Verdict.NOT_SHOWN),  # a miss must be shown as well
        ([0.4, 0.41, 0.42], Target(0.5), Verdict.REACHED),
        ([0.6, 0.61, 0.62], Target(0.5), Verdict.MISSED),
        ([0, 0, 0], Target(0), Verdict.REACHED),
        ([100, 100], AT_LEAST_20, Verdict.NOT_SHOWN),  # two rounds say nothing about the spread
        ([1, 2, 3], None, Verdict.NO_TARGET),
    ],
)
def test_a_verdict_needs_a_spread_narrower_than_the_margin(
    numbers: list[float], target: Target | None, verdict: Verdict
) -> None:
    assert judge(numbers, target) is verdict


def test_a_speedup_divides_the_cpu_times_of_the_same_round() -> None:
    samples: Samples = {OURS: seconds(1, 2, 4), PEER: seconds(30, 80, 200)}
    assert FASTER.numbers(samples) == (30, 40, 50)


def test_where_a_disk_is_waited_for_wall_time_is_compared() -> None:
    samples: Samples = {OURS: seconds(1, 2), PEER: [{"job_cpu": 9, "job_wall": 4}, {"job_cpu": 9, "job_wall": 16}]}
    share = Check("job", Reading(OURS, "job"), Reading(PEER, "job"), Target(0.5), wall=True)
    assert share.numbers(samples) == (0.5, 0.25)


def test_a_share_divides_the_other_way() -> None:
    samples: Samples = {OURS: seconds(1, 2), PEER: seconds(2, 8)}
    share = Check("job", Reading(OURS, "job"), Reading(PEER, "job"), Target(0.5))
    assert share.numbers(samples) == (0.5, 0.25)


def test_a_reading_can_be_what_goes_beyond_another_side() -> None:
    samples: Samples = {"base": [{"peak": 100.0}], OURS: [{"peak": 140.0}], PEER: [{"peak": 180.0}]}
    extra = Check("memory", Reading(OURS, "peak", "base"), Reading(PEER, "peak", "base"), Target(0.6), unit=Unit.BYTES)
    assert extra.numbers(samples) == (0.5,)


def test_a_line_shows_medians_and_the_verdict() -> None:
    samples: Samples = {OURS: seconds(0.001, 0.001, 0.001), PEER: seconds(0.5, 0.5, 0.5)}
    line = line_of(FASTER, samples)
    assert line.cells == ("job", "1.00 ms (2.00 ms)", "500 ms (1.00 s)", "**500×** (500 … 500)", "≥ 20×", "reached")
    assert line.verdict is Verdict.REACHED


def test_a_line_without_a_peer_shows_its_unit() -> None:
    samples: Samples = {OURS: [{"peak": 37_269_504.0}] * 3}
    check = Check("memory", Reading(OURS, "peak"), target=Target(150e6), unit=Unit.BYTES)
    assert line_of(check, samples).cells == ("memory", "37 MB", "—", "**37 MB** (37 MB … 37 MB)", "≤ 150 MB", "reached")


def test_a_metric_that_was_not_reported_is_an_error() -> None:
    with pytest.raises(KeyError, match="job_cpu"):
        FASTER.numbers({OURS: [{}], PEER: [{}]})


def test_the_table_has_one_row_per_line_and_equal_columns() -> None:
    line = line_of(FASTER, {OURS: seconds(1, 1, 1), PEER: seconds(2, 2, 2)})
    rows = markdown([line, line]).splitlines()
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_row_compares_only_sides_that_it_measures(name: str) -> None:
    row: Row = importlib.import_module(f"benchmarks.rows.{name.replace('-', '_')}").ROW
    readings = [r for check in row.checks for r in (check.of, check.against) if r is not None]
    named = {r.side for r in readings} | {r.over for r in readings if r.over is not None}
    assert named <= set(row.sides)


def test_a_process_that_fails_fails_the_row_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("Job", "how", (FASTER,), {OURS: ("no-such-library",), PEER: (PEER,)})
    monkeypatch.setattr(importlib.import_module("benchmarks.rows.startup"), "ROW", row)
    done = measure_row("startup", rounds=3)
    assert done.lines == ()
    assert done.error.startswith(f"{OURS}: ")
    assert "no-such-library" in done.error
    assert "**Job** failed" in page([done], [], 60.0)


def test_an_unknown_row_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["second-adaptor"])
    assert raised.value.code == 2
    assert "second-adapter" in capsys.readouterr().err
