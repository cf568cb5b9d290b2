"""From raw readings to a verdict: what is compared with what, how far readings spread, and whether a target is shown.

Pure functions of numbers. A verdict is given only when the spread is narrower than the distance to the target.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

#: What one measured process reports: seconds end in `_cpu` and `_wall`, all else is bytes or a plain number.
Readings = Mapping[str, float]
#: Readings by side of a row, one per round; entries of one index were taken one after the other.
Samples = Mapping[str, Sequence[Readings]]

#: Fewer rounds say nothing about the spread.
MIN_ROUNDS = 3


class Unit(StrEnum):
    """What a metric counts."""

    SECONDS = "s"
    BYTES = "MB"
    NUMBER = ""


class Verdict(StrEnum):
    """What a row shows about its target."""

    REACHED = "reached"
    MISSED = "missed"
    NOT_SHOWN = "not shown"
    NO_TARGET = "—"


@dataclass(frozen=True)
class Reading:
    """A metric of one side, without the same metric of the side `over` where that is given."""

    side: str
    metric: str
    over: str | None = None

    def values(self, samples: Samples, suffix: str = "") -> tuple[float, ...]:
        """One value per round. Raises `KeyError` when a process did not report the metric."""
        key = self.metric + suffix
        values = tuple(readings[key] for readings in samples[self.side])
        if self.over is None:
            return values
        return tuple(value - less[key] for value, less in zip(values, samples[self.over], strict=True))


@dataclass(frozen=True)
class Target:
    """A bound that the number must keep, from below (`at_least`) or from above."""

    bound: float
    at_least: bool = False

    def kept_by(self, number: float) -> bool:
        return number >= self.bound if self.at_least else number <= self.bound


@dataclass(frozen=True)
class Check:
    """One line of the table.

    The number of a round is `of` alone, or a ratio with `against`: with a target from below how many times smaller `of`
    is (`against / of`), otherwise what share of `against` it is (`of / against`). Seconds are compared in CPU time, or in
    `wall` time where it is a disk that is waited for.
    """

    what: str
    of: Reading
    against: Reading | None = None
    target: Target | None = None
    unit: Unit = Unit.SECONDS
    times: bool = False
    wall: bool = False

    @property
    def is_speedup(self) -> bool:
        return self.times or (self.target is not None and self.target.at_least)

    def numbers(self, samples: Samples) -> tuple[float, ...]:
        """What the verdict is about, one number per round."""
        suffix = "" if self.unit is not Unit.SECONDS else "_wall" if self.wall else "_cpu"
        of = self.of.values(samples, suffix)
        if self.against is None:
            return of
        against = self.against.values(samples, suffix)
        pairs = zip(of, against, strict=True)
        return tuple(theirs / ours if self.is_speedup else ours / theirs for ours, theirs in pairs)


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        return self.high - self.low


def summarise(numbers: Sequence[float]) -> Summary:
    """Median and quartiles; all the same for a single number."""
    if len(numbers) < 2:
        return Summary(numbers[0], numbers[0], numbers[0])
    low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return Summary(median, low, high)


def judge(numbers: Sequence[float], target: Target | None) -> Verdict:
    """Reached or missed, if the distance between the quartiles is no wider than that from the median to the target."""
    if target is None:
        return Verdict.NO_TARGET
    summary = summarise(numbers)
    if len(numbers) < MIN_ROUNDS or summary.spread > abs(summary.median - target.bound):
        return Verdict.NOT_SHOWN
    return Verdict.REACHED if target.kept_by(summary.median) else Verdict.MISSED


@dataclass(frozen=True)
class Line:
    """A check with what was measured, as text in the columns of the table."""

    cells: tuple[str, ...]
    verdict: Verdict


HEADER = ("what", "ours", "reference", "result (quartiles)", "target", "verdict")


def line_of(check: Check, samples: Samples) -> Line:
    """The table's line for a check."""
    numbers = check.numbers(samples)
    verdict = judge(numbers, check.target)
    unit = Unit.NUMBER if check.against is not None else check.unit
    sign = "×" if check.against is not None else ""
    summary = summarise(numbers)
    result = f"**{_amount(summary.median, unit)}{sign}** ({_amount(summary.low, unit)} … {_amount(summary.high, unit)})"
    target = "—"
    if check.target is not None:
        target = f"{'≥' if check.target.at_least else '≤'} {_bound(check.target.bound, unit)}{sign}"
    ours = _measured(check.of, check.unit, samples)
    theirs = _measured(check.against, check.unit, samples) if check.against is not None else "—"
    return Line((check.what, ours, theirs, result, target, verdict.value), verdict)


def markdown(lines: Sequence[Line]) -> str:
    """The table in Markdown."""
    rows = [HEADER, ("---", "---:", "---:", "---:", "---:", "---"), *(line.cells for line in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _measured(reading: Reading, unit: Unit, samples: Samples) -> str:
    """The median of what was measured; for seconds CPU time, and wall time in brackets."""
    if unit is not Unit.SECONDS:
        return _amount(statistics.median(reading.values(samples)), unit)
    cpu = statistics.median(reading.values(samples, "_cpu"))
    wall = statistics.median(reading.values(samples, "_wall"))
    return f"{_amount(cpu, unit)} ({_amount(wall, unit)})"


def _bound(value: float, unit: Unit) -> str:
    """A target, as it was set."""
    return f"{value / 1e6:g} MB" if unit is Unit.BYTES else f"{value:g} {unit.value}".strip()


def _amount(value: float, unit: Unit) -> str:
    """A number with three significant digits and its unit."""
    if unit is Unit.BYTES:
        return f"{value / 1e6:.0f} MB"
    if unit is Unit.SECONDS:
        for size, name in ((1.0, "s"), (1e-3, "ms")):
            if abs(value) >= size:
                return f"{_digits(value / size)} {name}"
        return f"{_digits(value / 1e-6)} µs"
    return _digits(value)


def _digits(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
