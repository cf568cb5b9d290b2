"""`python -m tests.faults [METHOD...]`: a failure at every call of every operation of the methods (all of them)."""

from __future__ import annotations

import argparse
import sys
import time

from peftc.registry.manager import default_registry
from tests.faults.injection import FAILURES, calls, lines
from tests.faults.operations import Case, operations
from tests.faults.runs import counted, failed


def main() -> int:
    """Print one line for each operation, and what was wrong. 0: nothing was."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("methods", nargs="*", default=default_registry().names)
    parser.add_argument("--lines", action="store_true", help="an interrupt on every line instead")
    parser.add_argument("--all-kinds", action="store_true", help="every kind of failure at each call, not one in turn")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th call or line")
    args = parser.parse_args()
    inject = lines if args.lines else calls
    failures = [KeyboardInterrupt] if args.lines else FAILURES if args.all_kinds else None
    wrong = total = 0
    start = time.process_time()
    for name in args.methods:
        case = Case(name)
        for operation in operations(case):
            places = len(counted(operation, inject))
            bad = list(failed(operation, range(1, places + 1, args.every), inject, failures))
            total += len(range(0, places, args.every)) * len(failures or [0])
            wrong += len(bad)
            print(f"{name:24} {operation!s:32} {places:5} places, {len(bad)} failures that left something", flush=True)
            for line in bad[:20]:
                print(f"    {line}", flush=True)
    print(f"{total:,} failures, {wrong} left something, {time.process_time() - start:.0f} s of one core")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
