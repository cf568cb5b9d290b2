"""`peftc plugins`: every installed claim to a PEFT type, whose it is, and whether it can be used."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from peftc.cli import console
from peftc.diagnostics import Diagnostic, PeftcError

if TYPE_CHECKING:
    from peftc.registry.manager import Claim, Registry

HELP = "List installed plugins and whether they load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--check", action="store_true", help="load every plugin and report those that fail")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from peftc.registry.manager import default_registry

    registry = default_registry()
    problems: list[Diagnostic] = []
    rows = []
    for claim in registry.claims:
        state, found = _state(registry, claim, args.check)
        problems.extend(found)
        rows.append((claim.peft_type, claim.module, f"{claim.distribution} {claim.version}", state))
    told = list(dict.fromkeys(problems))
    if args.json:
        keys = ("peft_type", "module", "distribution", "state")
        plugins = [dict(zip(keys, row, strict=True)) for row in rows]
        console.out_json({"ok": not told, "plugins": plugins, "diagnostics": [d.to_dict() for d in told]})
    else:
        console.out(console.table(rows, ("TYPE", "MODULE", "DISTRIBUTION", "STATE")))
        console.show(told)
    return int(bool(told))


def _state(registry: Registry, claim: Claim, load: bool) -> tuple[str, tuple[Diagnostic, ...]]:
    """`blocked`, `conflict`, `broken`, `loads`, or `installed` if it was not tried."""
    if claim.name in registry.blocked:
        return "blocked", ()
    if not load and len(registry.claims_for(claim.peft_type)) == 1:
        return "installed", ()
    try:
        registry.get(claim.peft_type)
    except PeftcError as error:
        conflict = len(registry.claims_for(claim.peft_type)) > 1
        return "conflict" if conflict else "broken", error.diagnostics
    return "loads", ()
