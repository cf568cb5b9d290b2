"""`peftc plugins`: which plugins are installed and whether they load; begin a new one; check one against the contract."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from peftc.cli import console
from peftc.diagnostics import Diagnostic, PeftcError

if TYPE_CHECKING:
    from peftc.registry.door import Claim, Door
    from peftc.testing.report import Report

HELP = "List installed plugins, begin a new one, or check one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options, and its two subcommands."""
    parser.add_argument("--check", action="store_true", help="load every plugin and report those that fail")
    parser.add_argument("--json", action="store_true", help="print JSON")
    actions = parser.add_subparsers(dest="action", metavar="{new,check}", help="left out: list the plugins")
    new = _action(actions, "new", "Write the distribution of a new plugin, which passes its tests at once")
    new.add_argument("name", metavar="NAME", help="the method's name, e.g. `my-method`")
    new.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="where to put its folder; left out, here")
    check = _action(actions, "check", "Check that a plugin does what every method must do")
    check.add_argument(
        "name",
        metavar="NAME",
        help="a PEFT type, `<peft type>.<variant>`, a start, a storage, or the file or folder of a module with one",
    )
    check.add_argument("--only", action="append", metavar="CHECK", help="only the check of this name; may be repeated")
    check.add_argument("--storage", default="", metavar="NAME", help="check a method on layers in this storage alone")


def _action(actions: argparse._SubParsersAction[Any], name: str, line: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, description=f"{line}.", help=line, allow_abbrev=False)
    for options in (("--json",), ("-q", "--quiet")):  # those of the command, wherever they stand
        parser.add_argument(*options, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    actions = {None: _list, "new": _new, "check": _check}
    return actions[args.action](args)


# list -----------------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    from peftc.registry.manager import default_registry
    from peftc.registry.starts import default_starts
    from peftc.registry.storages import default_storages

    problems: list[Diagnostic] = []
    registry = default_registry()
    doors: tuple[Door[Any], ...] = (registry, registry.variants, default_starts(), default_storages())
    rows, variants, starts, storages = (_rows(door, args.check, problems) for door in doors)
    rows += variants
    told = list(dict.fromkeys(problems))
    if args.json:
        keys = ("module", "distribution", "state")
        of_methods, of_starts, of_storages = (
            [dict(zip((name, *keys), row, strict=True)) for row in found]
            for name, found in (("peft_type", rows), ("start", starts), ("storage", storages))
        )
        facts = {"plugins": of_methods, "starts": of_starts, "storages": of_storages}
        console.out_json({"ok": not told, **facts, "diagnostics": [d.to_dict() for d in told]})
    else:
        console.out(console.table(rows, ("TYPE", "MODULE", "DISTRIBUTION", "STATE")))
        console.out(console.table(starts, ("START", "MODULE", "DISTRIBUTION", "STATE")))
        console.out(console.table(storages, ("STORAGE", "MODULE", "DISTRIBUTION", "STATE")))
        console.show(told)
    return int(bool(told))


def _rows(door: Door[Any], load: bool, problems: list[Diagnostic]) -> list[tuple[str, str, str, str]]:
    """What claims to come in by a door; what is wrong with it is added to the problems."""
    rows = []
    for claim in door.claims:
        state, found = _state(door, claim, load)
        problems.extend(found)
        rows.append((door.key(claim.name), claim.module, f"{claim.distribution} {claim.version}", state))
    return rows


def _state(door: Door[Any], claim: Claim, load: bool) -> tuple[str, tuple[Diagnostic, ...]]:
    """`blocked`, `conflict`, `broken`, `loads`, or `installed` if it was not tried."""
    key = door.key(claim.name)
    if claim.name in door.blocked:
        return "blocked", ()
    if not load and len(door.claims_for(key)) == 1:
        return "installed", ()
    try:
        door.get(key)
    except PeftcError as error:
        conflict = len(door.claims_for(key)) > 1
        return "conflict" if conflict else "broken", error.diagnostics
    return "loads", ()


# new ------------------------------------------------------------------------------------------------------------------


def _new(args: argparse.Namespace) -> int:
    from peftc.cli.plugin_new import names_of, write_plugin
    from peftc.registry.manager import default_registry

    names = names_of(args.name, default_registry())
    folder = write_plugin(names, args.dir)
    if args.json:
        facts = {"folder": str(folder), "peft_type": names.peft_type, "distribution": names.distribution}
        console.out_json({"ok": True, **facts, "module": names.package})
        return 0
    console.out(f"Wrote {folder}: the method {names.peft_type} in {names.package}/__init__.py")
    console.note(f"Install it:  pip install -e {folder}", args.quiet)
    console.note(f"Check it:    peftc plugins check {names.peft_type}", args.quiet)
    return 0


# check ----------------------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    """Run the conformance kit. Torch and the kit are imported here."""
    from peftc.cli import progress
    from peftc.testing import kit

    plugin = _plugin(args.name)
    chosen = kit.chosen(plugin, args.only or (), args.storage)
    with progress.stage(f"Checking {chosen[0].of}", len(chosen), quiet=args.quiet) as stage:
        report = kit.report_of(chosen, stage.at)
    if args.json:
        console.out_json(_plain(report))
    else:
        console.out(console.plain(str(report)))
    return int(bool(report.findings))


def _plugin(name: str) -> str | ModuleType:
    """A PEFT type in its own case, or the module of a plugin that is not installed, imported from where it lies."""
    from peftc.registry.boundary import boundary
    from peftc.registry.manager import default_registry

    path = _package_in(Path(name).resolve())
    is_module = path.suffix == ".py" and path.is_file()
    if not is_module and not (path / "__init__.py").is_file():
        peft_type = name.upper().replace("-", "_")
        return peft_type if peft_type in default_registry().names else name
    sys.path.insert(0, str(path.parent))
    with boundary(path.name, "import"):
        return importlib.import_module(path.stem)


def _package_in(path: Path) -> Path:
    """The one package of a distribution's folder; any other path as it is."""
    if not (path / "pyproject.toml").is_file():
        return path
    packages = [found.parent for found in path.glob("*/__init__.py") if found.parent.name != "tests"]
    return packages[0] if len(packages) == 1 else path


def _plain(report: Report) -> dict[str, Any]:
    findings = [
        {"check": f.check, "subject": f.subject, "line": f.line, "diagnostics": [d.to_dict() for d in f.diagnostics]}
        for f in report.findings
    ]
    return {"ok": not findings, "peft_type": report.peft_type, "ran": report.ran, "findings": findings}
