"""The page `docs/peer-suite.md`, from the two records and the table of causes: how many pass, and why each other one does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.peer_suite.causes import TO_COME, UNEXPLAINED, VERDICTS, Cause, causes
from benchmarks.peer_suite.record import BASELINE, PASSED, RECORD, Recorded, function_of, read
from benchmarks.peer_suite.source import VERSION

#: The state of a test that is not on record.
NOT_RUN = "not run"

_HEAD = """\
# The reference's own tests

The tests of `peft` {version}, from its source distribution on PyPI, run against peftc's alias: `make peer-suite`. They run
offline, on small random models that stand in for those of the hub. Names that peftc does not have yet are stand-ins too, for the
tests alone: a test that uses one fails, and counts as one of what is to come. Tests that need an accelerator are left out or skip
themselves.

On the reference itself {reference}; here {here}.

| tests | |
| --- | --- |
| in all | {all:,} |
| the reference passes | {passing:,} |
| of these, need a method or an option to come | {to_come:,} |
{not_run}| need only what exists | {existing:,} |
| of these, pass here | {good:,}: **{share:.2f} %** |

`benchmarks/peer_suite/record.json.gz` has the result of each test. In CI a sample of those that need only what exists runs, and
no test may fail that passed when the record was made."""


def page() -> str:
    """The whole page."""
    baseline, record, table = read(BASELINE), read(RECORD), causes()
    passing = [test for test, state in baseline.states.items() if state == PASSED]
    by_cause: dict[str, list[str]] = {key: [] for key in [PASSED, *table, UNEXPLAINED, NOT_RUN]}
    for test in passing:
        state = record.states.get(test, NOT_RUN)
        by_cause[state if state in by_cause else NOT_RUN].append(test)  # what a former table said says nothing now
    to_come = sum(len(by_cause[key]) for key, cause in table.items() if cause.verdict == TO_COME)
    good, existing = len(by_cause[PASSED]), len(passing) - to_come - len(by_cause[NOT_RUN])
    head = _HEAD.format(
        version=VERSION,
        reference=_when(baseline),
        here=_when(record),
        all=len(baseline.states),
        passing=len(passing),
        to_come=to_come,
        not_run=f"| of these, not run yet | {len(by_cause[NOT_RUN]):,} |\n" if by_cause[NOT_RUN] else "",
        existing=existing,
        good=good,
        share=100 * good / existing,
    )
    return "\n\n".join([head, *_coming(by_cause, table), *_others(by_cause, table)]) + "\n"


def _when(recorded: Recorded) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in recorded.versions.items())
    return f"on {recorded.date}, Python {recorded.python}, {versions}"


def _coming(by_cause: Mapping[str, Sequence[str]], table: Mapping[str, Cause]) -> Iterator[str]:
    yield "## What is to come"
    rows = [
        f"| {cause.title} | {len(by_cause[key]):,} | {cause.why} |"
        for key, cause in table.items()
        if cause.verdict == TO_COME and by_cause[key]
    ]
    yield "\n".join(["| needs | tests | |", "| --- | --- | --- |", *rows])


def _others(by_cause: Mapping[str, Sequence[str]], table: Mapping[str, Cause]) -> Iterator[str]:
    """Every other test that does not pass, by who is right and why."""
    yield "## Every other one, with its reason"
    counts: Counter[str] = Counter()
    for key, cause in table.items():
        counts[cause.verdict] += len(by_cause[key])
    shown = [verdict for verdict in VERDICTS if verdict != TO_COME and counts[verdict]]
    rows = [f"| {verdict}: {VERDICTS[verdict]} | {counts[verdict]:,} |" for verdict in shown]
    yield "\n".join(["| who is right | tests |", "| --- | --- |", *rows])
    for verdict in shown:
        yield f"### {verdict[0].upper()}{verdict[1:]}"
        for key, cause in table.items():
            if cause.verdict == verdict and by_cause[key]:
                yield f"**{cause.title}** ({len(by_cause[key])}). {cause.why}"
                yield "\n".join(_functions(by_cause[key]))
    if by_cause[UNEXPLAINED]:
        yield "### Without a reason"
        yield "\n".join(_functions(by_cause[UNEXPLAINED]))


def _functions(tests: Sequence[str]) -> list[str]:
    """The functions of tests, and how many sets of parameters of each."""
    counts = Counter(map(function_of, tests))
    return [
        f"- `{name.removeprefix('tests/')}`" + (f" × {count}" if count > 1 else "") for name, count in counts.items()
    ]
