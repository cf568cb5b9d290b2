"""`python -m tests.faults [METHOD...]`: a failure of every kind at every call of every operation of the methods (all of them)."""

from __future__ import annotations

import sys
import time

from peftc.registry.manager import default_registry
from tests.faults.injection import FAILURES
from tests.faults.operations import Case, operations
from tests.faults.runs import counted, failed


def main(names: list[str]) -> int:
    """Print one line for each operation, and what was wrong. 0: nothing was."""
    wrong = total = 0
    start = time.process_time()
    for name in names or default_registry().names:
        case = Case(name)
        for operation in operations(case):
            places = counted(operation)
            bad = list(failed(operation, range(1, len(places) + 1), failures=FAILURES))
            total += len(places) * len(FAILURES)
            wrong += len(bad)
            print(
                f"{name:24} {operation!s:32} {len(places):5} calls, {len(bad)} failures that left something", flush=True
            )
            for line in bad[:20]:
                print(f"    {line}", flush=True)
    print(f"{total:,} failures, {wrong} left something, {time.process_time() - start:.0f} s of one core")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
