"""On which releases the whole suite was run, from `tried.json` beside this file: one entry for each environment.

`make test-newest`, `make test-oldest` and `make test-on` write the entries; `docs/versions.md` and `peftc doctor` show them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the whole suite: which environment, when (`YYYY-MM-DD`), the versions of packages, and how many tests."""

    environment: str
    date: str
    python: str
    versions: Mapping[str, str]
    passed: int
    failed: int
    skipped: int

    @property
    def key(self) -> tuple[str, str]:
        """What a newer run takes the place of: the same environment with the same transformers."""
        return self.environment, self.versions.get("transformers", "")


@cache
def runs() -> tuple[Run, ...]:
    """All runs that are on record."""
    return runs_from(files("peftc.installed").joinpath("tried.json").read_text(encoding="utf-8"))


def runs_from(text: str) -> tuple[Run, ...]:
    """Runs out of the text of the file."""
    return tuple(Run(**entry) for entry in json.loads(text))


def with_run(text: str, run: Run) -> str:
    """The text of the file with one run more, in place of an older one of that environment; the newest transformers first."""
    kept = [one for one in runs_from(text) if one.key != run.key]
    ordered = sorted(
        [*kept, run], key=lambda one: (_order(one.versions.get("transformers", "0")), one.date), reverse=True
    )
    return json.dumps([asdict(one) for one in ordered], indent=2, sort_keys=True) + "\n"


def tried_versions(package: str, among: Iterable[Run] | None = None) -> list[str]:
    """The releases of a package that were tried, the newest first."""
    found = {run.versions[package] for run in (runs() if among is None else among) if package in run.versions}
    return sorted(found, key=_order, reverse=True)


def public(version: str) -> str:
    """A version without its local part: `2.13.0+cpu` is a build of `2.13.0`."""
    return version.partition("+")[0]


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in public(version).split("."))
