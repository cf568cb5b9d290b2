"""`make peer-suite`: run the reference's tests on peftc's alias, compare with what the reference passes, write it down.

The whole of it runs all tests that need only what exists, writes `record.json.gz` and `docs/peer-suite.md`; `--sample` and
`--match` run some and compare with the record, and with `--write` put into it what these came to. Exit code 1: a test fails
that is recorded as passing, or one without a cause that is not recorded as failing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.peer_suite.causes import TO_COME, UNEXPLAINED, Cause, cause_of, causes
from benchmarks.peer_suite.needs import lacking_in
from benchmarks.peer_suite.record import BASELINE, PASSED, RECORD, now, read, write
from benchmarks.peer_suite.run import ROOT, Row, not_collected, run
from benchmarks.peer_suite.sample import sample
from benchmarks.peer_suite.source import UnreachableError, suite

_SHOWN = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Run, compare and tell."""
    args = _arguments(argv)
    try:
        suite()
    except UnreachableError as error:
        print(f"peer-suite is skipped. {error}")
        return 0
    if args.baseline:
        return _baseline(args)
    passing = [test for test, state in read(BASELINE).states.items() if state == PASSED]
    before = read(RECORD).states if RECORD.exists() else {}
    table = causes()
    waiting = {test: cause_of(text, table.values()) for test in passing if (text := lacking_in(test))}
    chosen = [test for test in passing if test not in waiting and re.search(args.match, test)]
    if args.sample:
        there = [test for test in chosen if args.write or _counts(before.get(test), table)]
        chosen = sample(there, args.sample)
    label = "sample" if args.sample else "some" if args.match else "whole"
    rows = run(chosen, label, alias=True, workers=args.workers, resume=args.resume)
    states = {test: PASSED if row.passed else cause_of(row.text, table.values()) for test, row in rows.items()}
    whole = not args.sample and not args.match
    if whole or args.write:
        others = {} if whole else {test: before[test] for test in passing if test in before}
        write(now({**others, **waiting, **states}), RECORD)
        subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--no-examples"], check=True)
    return _told(rows, states, before, table, unused=whole, label=label)


def _counts(state: str | None, table: Mapping[str, Cause]) -> bool:
    """Whether a test of that recorded state needs only what exists."""
    return state is not None and (state not in table or table[state].verdict != TO_COME)


def _baseline(args: argparse.Namespace) -> int:
    """What the reference itself passes, in this environment."""
    rows = run((), "baseline", alias=False, workers=args.workers, resume=args.resume)
    write(now({test: row.outcome for test, row in rows.items()}), BASELINE)
    print(dict(Counter(row.outcome for row in rows.values())))
    return 0


def _told(
    rows: Mapping[str, Row],
    states: Mapping[str, str],
    before: Mapping[str, str],
    table: Mapping[str, Cause],
    *,
    unused: bool,
    label: str,
) -> int:
    """Print what came out, and give the exit code."""
    existing = [state for state in states.values() if _counts(state, table)]
    good = existing.count(PASSED)
    for key, count in Counter(states.values()).most_common():
        title = f"{table[key].verdict}: {table[key].title}" if key in table else key
        print(f"{count:6} {title}")
    print(f"{good} of {len(existing)} that need only what exists pass, {100 * good / max(len(existing), 1):.2f} %")
    for file, why in not_collected(label).items():
        print(f"not collected: {file}: {why}")
    worse = [test for test, state in states.items() if state != PASSED and before.get(test) == PASSED]
    lost = [
        test
        for test, state in states.items()
        if state == UNEXPLAINED and (unused or before.get(test) in (None, PASSED))
    ]
    better = [test for test, state in states.items() if state == PASSED and before.get(test, PASSED) != PASSED]
    stale = sorted(set(table) - set(states.values())) if unused else []
    _listed("pass that were recorded as not passing; `make peer-suite` records them", better)
    _listed("are recorded as passing and do not pass", [rows[test].text for test in worse])
    _listed("have no cause in causes.toml", [rows[test].text for test in lost])
    _listed("rows of causes.toml explain nothing any more", [key for key in stale if table[key].verdict != TO_COME])
    return 1 if worse or lost else 0


def _listed(what: str, items: Sequence[str]) -> None:
    if items:
        print(f"\n{len(items)} {what}:")
        print("\n".join(items[:_SHOWN]))
        if len(items) > _SHOWN:
            print(f"... and {len(items) - _SHOWN} more")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_suite", description=(__doc__ or "").strip())
    parser.add_argument("--sample", type=int, metavar="N", help="run N tests and compare with the record")
    parser.add_argument("--match", default="", metavar="REGEX", help="run only tests in whose id this is found")
    parser.add_argument("--baseline", action="store_true", help="run the reference itself, and record what it passes")
    parser.add_argument("--write", action="store_true", help="put what some tests came to into the record")
    parser.add_argument("--resume", action="store_true", help="run what the last run of this kind did not come to")
    cores = min(len(os.sched_getaffinity(0)), 8)
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="processes, as many as cores if not given"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
