"""`peftc schema`: print a JSON Schema, write the committed ones, or check that they are up to date."""

from __future__ import annotations

import argparse
import difflib
from importlib.resources import files
from pathlib import Path

from peftc import rules
from peftc.cli import console
from peftc.diagnostics import Diagnostic, PeftcError, Where

HELP = "Print, write or check the JSON Schemas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="`spec`, `plan`, `graph` or a PEFT type; left out: list the names"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write the schema, or all, into the folder")
    action.add_argument("--check", action="store_true", help="fail with a diff if a file in the folder differs")
    parser.add_argument("--dir", metavar="FOLDER", help="the folder (default: the schemas that come with peftc)")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from peftc.registry.manager import default_registry
    from peftc.schema.generate import file_name, names, schema_named, to_text

    registry = default_registry()
    if not (args.write or args.check or args.name):
        for name in names(registry):
            console.out(name)
        return 0
    wanted = [args.name] if args.name else names(registry)
    texts = {file_name(name): to_text(schema_named(name, registry)) for name in wanted}
    folder = Path(args.dir) if args.dir else Path(str(files("peftc.schemas")))
    if args.write:
        return _write(folder, texts, args.quiet)
    if args.check:
        stale = [] if args.name else _stale(folder, set(texts))
        mend = f"peftc schema --write --dir {args.dir}" if args.dir else "peftc schema --write"
        return _check(folder, texts, stale, mend, args.quiet)
    for text in texts.values():
        console.out(text.rstrip("\n"))
    return 0


def _write(folder: Path, texts: dict[str, str], quiet: bool) -> int:
    from peftc.config.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if _committed(folder / name) != text:
            write_text(folder / name, text)
            console.note(f"wrote {folder / name}", quiet)
    return 0


def _check(folder: Path, texts: dict[str, str], stale: list[Path], mend: str, quiet: bool) -> int:
    found: list[Diagnostic] = []
    for name, text in texts.items():
        committed = _committed(folder / name)
        if committed == text:
            continue
        console.out("\n".join(_diff(committed or "", text, name)))
        what = f"`{name}` is missing" if committed is None else f"`{name}` is not what the configs say"
        found.append(rules.SCHEMA_DRIFT(what, fix=f"Run `{mend}`.", where=Where(file=str(folder / name))))
    for path in stale:
        what = f"`{path.name}` belongs to no method"
        found.append(rules.SCHEMA_DRIFT(what, fix="Delete the file.", where=Where(file=str(path))))
    if found:
        raise PeftcError(found)
    console.note(f"{len(texts)} schemas are up to date", quiet)
    return 0


def _committed(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _stale(folder: Path, expected: set[str]) -> list[Path]:
    return sorted(path for path in folder.glob("*.schema.json") if path.name not in expected)


def _diff(old: str, new: str, name: str) -> list[str]:
    return list(
        difflib.unified_diff(old.splitlines(), new.splitlines(), f"{name} (committed)", f"{name} (now)", lineterm="")
    )
