"""`python -m tests.faults [METHOD...]`: a failure of every kind at every call of every operation of the methods (all of them).

`python -m tests.faults lines [METHOD...]`: an interrupt on every line instead.
"""

from __future__ import annotations

import sys
import time

from peftc.registry.manager import default_registry
from tests.faults.injection import FAILURES, calls, lines
from tests.faults.operations import Case, operations
from tests.faults.runs import counted, failed


def main(names: list[str]) -> int:
    """Print one line for each operation, and what was wrong. 0: nothing was."""
    wrong = total = 0
    by_line = names[:1] == ["lines"]
    inject, failures = (lines, [KeyboardInterrupt]) if by_line else (calls, FAILURES)
    start = time.process_time()
    for name in names[by_line:] or default_registry().names:
        case = Case(name)
        for operation in operations(case):
            places = counted(operation, inject)
            bad = list(failed(operation, range(1, len(places) + 1), inject, failures))
            total += len(places) * len(failures)
            wrong += len(bad)
            print(
                f"{name:24} {operation!s:32} {len(places):5} places, {len(bad)} failures that left something",
                flush=True,
            )
            for line in bad[:20]:
                print(f"    {line}", flush=True)
    print(f"{total:,} failures, {wrong} left something, {time.process_time() - start:.0f} s of one core")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
