"""`peftc doctor`: what is installed, whether it fits, and what of it was tried. It is what a report of a problem should hold.

Versions come from metadata. torch is imported only to ask for accelerators; nothing that is printed names a folder.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import distributions

from peftc import __version__, compat, rules
from peftc.cli import console
from peftc.compat import pins
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.installed import requirements
from peftc.installed.requirements import installed_version
from peftc.installed.tried import public, tried_versions

HELP = "Show what is installed beside peftc, and what does not fit"

_REFERENCE = "peft"


@dataclass(frozen=True, slots=True)
class Package:
    """A package: the installed version, the releases that peftc admits, which extra needs it, and the releases tried."""

    name: str
    installed: str | None
    admitted: str
    extra: str
    tried: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code: 1 if something does not fit."""
    states, broken = _plugins()
    found = [*_problems(), *compat.conflicts(), *pins.unmet(), *broken]
    packages, accelerators = list(_packages()), _accelerators()
    if args.json:
        console.out_json(
            {
                "ok": not found,
                "peftc": __version__,
                "python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}",
                "packages": [asdict(package) for package in packages],
                "alias": {"says": compat.VERSION, "real": installed_version(_REFERENCE)},
                "accelerators": accelerators,
                "plugins": states,
                "diagnostics": [diagnostic.to_dict() for diagnostic in found],
            }
        )
        return int(bool(found))
    console.out(f"peftc {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}\n")
    console.out(console.table(map(_row, packages), ("PACKAGE", "INSTALLED", "WORKS WITH", "TRIED")))
    console.out("\n" + console.table(_facts(states, accelerators)))
    console.show(found)
    return int(bool(found))


def _problems() -> Iterator[Diagnostic]:
    """What must be installed and is not, and what is installed and does not fit; an extra may be left out."""
    copies = sorted({copy.version for copy in distributions(name="peftc")})
    if len(copies) > 1:
        what = f"peftc is installed more than once, as {' and as '.join(copies)}"
        yield rules.ALIAS_TWICE(what, fix="`pip uninstall peftc` until none is left, then `pip install peftc`.")
    yield from requirements.problems()
    for extra in requirements.EXTRAS:
        yield from (d for d in requirements.problems(extra) if d.code == rules.RELEASE_OUTSIDE.code)


def _packages() -> Iterator[Package]:
    needs = requirements.needs()
    for need in needs:
        yield _package(need.name, str(need.releases), need.extra)
    for name in sorted({str(pin["by"]) for pin in pins.data()["asked"]} - {need.name for need in needs}):
        if installed_version(name) is not None:
            yield _package(name, "", "")


def _package(name: str, admitted: str, extra: str) -> Package:
    ordered = ",".join(sorted(filter(None, admitted.split(",")), reverse=True))
    return Package(name, installed_version(name), ordered, extra, tried_versions(name))


def _row(package: Package) -> tuple[str, str, str, str]:
    missing = f"no; for `peftc[{package.extra}]`" if package.extra else "no"
    return package.name, package.installed or missing, package.admitted or "any", _tried(package)


def _tried(package: Package) -> str:
    if not package.installed:
        return ""
    if public(package.installed) in map(public, package.tried):
        return "yes"
    return f"no; {', '.join(package.tried)}" if package.tried else "no"


def _plugins() -> tuple[list[dict[str, str]], list[Diagnostic]]:
    """Each method with what brings it and whether it loads, and what is wrong with those that do not."""
    from peftc.registry.manager import default_registry

    registry = default_registry()
    states: list[dict[str, str]] = []
    broken: list[Diagnostic] = []
    for claim in registry.claims:
        state = "blocked" if claim.name in registry.blocked else "loads"
        if state == "loads":
            try:
                registry.get(claim.peft_type)
            except PeftcError as error:
                state = "broken"
                broken += error.diagnostics
        states.append(
            {"peft_type": claim.peft_type, "distribution": claim.distribution, "version": claim.version, "state": state}
        )
    return states, list(dict.fromkeys(broken))


def _facts(states: list[dict[str, str]], accelerators: list[str]) -> Iterator[tuple[str, str]]:
    real = installed_version(_REFERENCE)
    beside = f"the real one, {real}, is installed too" if real else "the real one is not installed"
    yield "alias `peft`", f"says {compat.VERSION}; {beside}"
    yield "accelerators", ", ".join(accelerators) or "none"
    names = {state: [s["peft_type"] for s in states if s["state"] == state] for state in ("loads", "broken", "blocked")}
    others = sorted({f"{s['distribution']} {s['version']}" for s in states if s["distribution"] != "peftc"})
    yield "methods", f"{len(names['loads'])} load" + "".join(f"; from {other}" for other in others)
    for state in ("broken", "blocked"):
        if names[state]:
            yield state, ", ".join(names[state])


def _accelerators() -> list[str]:
    """Each accelerator that torch finds, by its name; nothing without torch."""
    if installed_version("torch") is None:
        return []
    try:
        from peftc.integrations.placement import accelerators  # here: below the torch line
    except (ImportError, OSError) as error:  # a build for another machine, a library of the system that is not there
        return [f"unknown, as torch cannot be imported: {type(error).__name__}: {error}"]
    return accelerators()
