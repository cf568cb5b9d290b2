"""What peftc asks of other packages, as its own metadata say it, and what of that an environment does not meet.

Checked once per process, where the torch line is crossed: above it nothing of the other libraries' behaviour is relied on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError

_OWN = "peftc"
#: extras that are for users; the others are for those who work on peftc
EXTRAS = ("train", "demo")


@dataclass(frozen=True, slots=True)
class Need:
    """A package that peftc asks for: its name, the releases that are admitted, and for which extra; `""` is for all."""

    name: str
    releases: SpecifierSet
    extra: str

    def __str__(self) -> str:
        return f"{self.name}{','.join(sorted(map(str, self.releases), reverse=True))}"


@cache
def needs() -> tuple[Need, ...]:
    """All that peftc asks for, in the order of its metadata; nothing where it runs without being installed."""
    try:
        lines = requires(_OWN) or ()
    except PackageNotFoundError:
        return ()
    return tuple(_needs(map(Requirement, lines)))


def _needs(lines: Iterator[Requirement]) -> Iterator[Need]:
    for line in lines:
        for extra in ("", *EXTRAS):
            if line.name != _OWN and (line.marker is None or line.marker.evaluate({"extra": extra})):
                yield Need(line.name, line.specifier, extra)
                break


def installed_version(name: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def problem(need: Need) -> Diagnostic | None:
    """What is wrong with one package, if anything."""
    found = installed_version(need.name)
    fix = f'Install a release that it works with: `pip install "{need}"`.'
    if found is None:
        what = f"peftc needs the package `{need.name}`, which is not installed"
        return rules.REQUIREMENT_MISSING(what, fix=fix)
    if need.releases.contains(found, prereleases=True):
        return None
    what = f"`{need.name}` {found} is installed; peftc works with `{need}`"
    return rules.RELEASE_OUTSIDE(what, fix=fix)


@cache
def problems(extra: str = "") -> tuple[Diagnostic, ...]:
    """What is wrong with the packages that all of peftc needs, or with those of an extra. Asked once per process."""
    found = (problem(need) for need in needs() if need.extra == extra)
    return tuple(diagnostic for diagnostic in found if diagnostic is not None)


def require(extra: str = "") -> None:
    """Raise `PeftcError`, with all problems at once, if packages are missing or of a release outside the bounds."""
    found = problems(extra)
    if found:
        raise PeftcError(found)
