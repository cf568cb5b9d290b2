"""`peftc validate`: check documents without a model, a plan or torch. Every problem of every file is shown at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from peftc.cli import console
from peftc.diagnostics import Diagnostic, PeftcError, Severity

HELP = "Check specs and adapter configs; every problem with its line"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a spec (YAML or JSON), an adapter config, or its folder"
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    verdicts = [_check(name) for name in args.files]
    failed = any(d.severity is Severity.ERROR for verdict in verdicts for d in verdict["diagnostics"])
    if args.json:
        console.out_json({"ok": not failed, "files": [_plain(verdict) for verdict in verdicts]})
        return int(failed)
    for verdict in verdicts:
        sys.stdout.flush()  # what is on stdout and on stderr appears in the order of the files
        console.show(verdict["diagnostics"])
        if verdict["summary"] and not args.quiet:
            console.out(
                f"{console.paint('ok', 'bold', 'green')}  {console.plain(verdict['file'])}: {verdict['summary']}"
            )
    return int(failed)


def _check(name: str) -> dict[str, Any]:
    """File, kind, summary (empty if it is not valid) and diagnostics."""
    from peftc.config.base import CONFIG_NAME
    from peftc.config.reader import read_document
    from peftc.schema.validate import check_document

    file = str(Path(name) / CONFIG_NAME) if Path(name).is_dir() else name
    verdict: dict[str, Any] = {"file": file, "kind": None, "summary": "", "diagnostics": ()}
    try:
        found = check_document(read_document(file))
    except PeftcError as error:
        return {**verdict, "diagnostics": error.diagnostics}
    verdict["diagnostics"] = found.diagnostics
    if found.spec is not None:
        adapters = ", ".join(f"{adapter} ({config.peft_type})" for adapter, config in found.spec.adapters.items())
        base = found.spec.base_ref.name or "a bare config"
        verdict |= {"kind": "spec", "summary": f"a spec: {adapters} on {base}"}
    elif found.config is not None:
        verdict |= {"kind": "config", "summary": f"a config of one {found.config.peft_type} adapter"}
    return verdict


def _plain(verdict: dict[str, Any]) -> dict[str, Any]:
    diagnostics: tuple[Diagnostic, ...] = verdict["diagnostics"]
    ok = all(d.severity is not Severity.ERROR for d in diagnostics)
    return {
        "file": verdict["file"],
        "kind": verdict["kind"],
        "ok": ok,
        "diagnostics": [d.to_dict() for d in diagnostics],
    }
