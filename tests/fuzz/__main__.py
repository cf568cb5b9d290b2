"""`python -m tests.fuzz 100000 [--seed N] [--only ENTRY] [--case N]`: many cases over all entries, and a table of what came of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.entries import entries
from tests.fuzz.runner import Outcome, run_case


def main() -> int:
    """Run the cases; 1 if one of them ended badly."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("cases", nargs="?", type=int, default=1000, help="how many, over all entries")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="one entry")
    parser.add_argument(
        "--case", type=int, help="one case of that entry, as the table numbers it; its error is not caught"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [entry for entry in entries(Path(folder)) if args.only in (None, entry.name)]
        place = Path(folder, "case")
        if args.case is not None:
            import random

            act = chosen[0].prepare(random.Random(f"{chosen[0].name} {args.seed} {args.case}"), place)
            act()
            return 0
        outcomes = {}
        for entry, share in zip(chosen, _shares(args.cases, [entry.weight for entry in chosen]), strict=True):
            outcome, start = Outcome(), time.monotonic()
            for number in range(share):
                run_case(entry, args.seed, number, place, outcome)
            outcomes[entry.name] = outcome
            print(_row(entry.name, outcome, time.monotonic() - start), flush=True)
            for kind, numbers in outcome.bad.items():
                print(f"    {len(numbers)} x {kind}   --case {', '.join(map(str, numbers[:5]))}", flush=True)
    bad = sum(len(numbers) for outcome in outcomes.values() for numbers in outcome.bad.values())
    print(f"{sum(outcome.cases for outcome in outcomes.values()):,} cases, {bad:,} bad")
    return int(bad > 0)


def _shares(cases: int, weights: list[int]) -> list[int]:
    return [cases * weight // sum(weights) for weight in weights]


def _row(name: str, outcome: Outcome, seconds: float) -> str:
    bad = sum(map(len, outcome.bad.values()))
    most = ", ".join(f"{code} {count}" for code, count in outcome.codes.most_common(4))
    return (
        f"{name:<12} {outcome.cases:>7,} cases  {outcome.told:>7,} told  {bad:>5,} bad"
        f"  slowest {outcome.slowest:.2f} s  {seconds:>6.0f} s  {most}"
    )


if __name__ == "__main__":
    sys.exit(main())
