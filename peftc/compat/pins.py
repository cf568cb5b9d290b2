"""Which version of `peft` the alias says it is: a decision as data, in `pins.json` beside this file.

`said` are the versions that it may say, lowest first; `asked` is what each release of a library asks for; `compared` are the
places where a library looks at the version, and what follows there. The lowest version is said that all libraries in the
environment admit: a higher one promises more. A test reads the same out of the libraries that are installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from packaging.specifiers import SpecifierSet

from peftc import rules
from peftc.diagnostics import Diagnostic
from peftc.installed.requirements import installed_version


@dataclass(frozen=True, slots=True)
class Pin:
    """What releases of a library ask: their range, the range of `peft`, and where the library says so."""

    by: str
    releases: SpecifierSet
    peft: SpecifierSet
    where: str

    def admits(self, version: str) -> bool:
        """Whether the library takes that version of `peft`."""
        return self.peft.contains(version, prereleases=True)


@cache
def data() -> Mapping[str, Any]:
    """The file, as it stands there."""
    found: dict[str, Any] = json.loads(files("peftc.compat").joinpath("pins.json").read_text(encoding="utf-8"))
    return found


def pins_of(library: str, release: str) -> list[Pin]:
    """What a release of a library asks for; nothing if the file does not know the library."""
    pins = (
        Pin(p["by"], SpecifierSet(p["releases"]), SpecifierSet(p["peft"]), p["where"])
        for p in data()["asked"]
        if p["by"] == library
    )
    return [pin for pin in pins if pin.releases.contains(release, prereleases=True)]


@cache
def pins_here() -> tuple[Pin, ...]:
    """What the libraries of this environment ask for."""
    libraries = dict.fromkeys(p["by"] for p in data()["asked"])
    there = {name: release for name in libraries if (release := installed_version(name)) is not None}
    return tuple(pin for name, release in there.items() for pin in pins_of(name, release))


def version_said() -> str:
    """The version of `peft` that the alias says it is here; the highest that it can say, if no version suits all."""
    versions: list[str] = data()["said"]
    fitting = (version for version in versions if all(pin.admits(version) for pin in pins_here()))
    return next(fitting, versions[-1])


def unmet() -> list[Diagnostic]:
    """Each library here that does not take the version that is said."""
    version = version_said()
    return [
        rules.ALIAS_OUTDATED(
            f"`{pin.by}` {installed_version(pin.by)} asks for `peft{pin.peft}` ({pin.where}); the alias says {version}",
            fix=f"Install another release of `{pin.by}`, or of those that ask for a newer `peft`; or run it without the alias.",
        )
        for pin in pins_here()
        if not pin.admits(version)
    ]
