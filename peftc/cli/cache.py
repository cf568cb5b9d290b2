"""`peftc cache`: what is kept of models that were planned for, and how to be rid of it."""

from __future__ import annotations

import argparse
import time

from peftc import rules
from peftc.cli import console
from peftc.diagnostics import PeftcError, Where
from peftc.graph.cache import Entry, GraphCache

HELP = "Show or clear the cache of module graphs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "action", nargs="?", choices=("list", "clear", "path"), default="list", help="what to do (list, if left out)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """List the cached graphs, remove them, or print where they are."""
    cache = GraphCache()
    if args.action == "path":
        if args.json:
            console.out_json({"path": str(cache.folder)})
        else:
            console.out(str(cache.folder))
        return 0
    entries = _cleared(cache) if args.action == "clear" else cache.entries()
    if args.json:
        console.out_json({"path": str(cache.folder), "graphs": [_as_data(entry) for entry in entries]})
        return 0
    total = f"{len(entries)} graph{'' if len(entries) == 1 else 's'}, {_size(sum(entry.size for entry in entries))}"
    if args.action == "clear":
        console.note(f"Removed {total}.", args.quiet)
        return 0
    if entries:
        console.out(console.table([_row(entry) for entry in entries], ("written", "size", "model")))
    console.note(f"{total} in {cache.folder}", args.quiet)
    return 0


def _cleared(cache: GraphCache) -> list[Entry]:
    try:
        return cache.clear()
    except OSError as error:
        where = Where(file=str(cache.folder))
        what = f"The cache cannot be cleared: {error.strerror}"
        raise PeftcError(rules.SYSTEM_REFUSED(what, fix="Check the folder's permissions.", where=where)) from error


def _row(entry: Entry) -> tuple[str, str, str]:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.written)), _size(entry.size), entry.label


def _as_data(entry: Entry) -> dict[str, object]:
    return {"file": entry.path.name, "size": entry.size, "written": entry.written, "label": entry.label}


def _size(count: int) -> str:
    """Bytes in powers of 1,024."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
