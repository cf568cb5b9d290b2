"""`python -m benchmarks sweep [TYPE …] [--out FILE]`: compare on all types of model, or on some, and write the page."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sweep.compare import ROOT, sweep
from benchmarks.sweep.models import model_types
from benchmarks.sweep.page import page

PAGE = ROOT / "docs" / "sweep.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write. 0: every difference has a reason; 1: one has none."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sweep", description="Compare what both libraries train."
    )
    parser.add_argument("types", nargs="*", metavar="TYPE", help="types of model, all if none")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page here; all types: docs/sweep.md")
    args = parser.parse_args(argv)
    known = model_types()
    unknown = sorted(set(args.types) - set(known))
    if unknown:
        parser.error(f"transformers knows no type {', '.join(unknown)}")
    types = tuple(args.types) or known
    found = sweep(types)
    out = args.out or (None if args.types else PAGE)
    if out is not None:
        out.write_text(page(found), encoding="utf-8")
        print(f"Written to {out}", file=sys.stderr)
    print(dict(Counter(one.relation.value for one in found.compared)))
    for one in found.unexplained:
        print(f"no reason: {one.difference.model_type}, {one.difference.label}: {one.relation}", file=sys.stderr)
    return 1 if found.unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())
