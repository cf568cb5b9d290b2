"""Writes down what a run of the whole suite came to, for the page of tried releases and for `peftc doctor`."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from peftc.compat import pins
from peftc.installed.requirements import installed_version, needs
from peftc.installed.tried import Run, public, with_run

FILE = Path(__file__).resolve().parent.parent / "peftc" / "installed" / "tried.json"
#: what decides results beside what peftc and the users' extras ask for
BESIDE = ("peft", "tokenizers", "numpy")


def is_whole(config: pytest.Config) -> bool:
    """Whether all tests were asked for: no file, no expression, no marker."""
    chosen = [config.getoption(name) for name in ("keyword", "markexpr", "deselect", "ignore", "maxfail")]
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not any(chosen)


def run_of(environment: str, stats: Mapping[str, Sequence[Any]]) -> Run:
    """The run that ends now, by what pytest counted."""
    names = [*(need.name for need in needs()), *(str(pin["by"]) for pin in pins.data()["asked"]), *BESIDE]
    found = {name: version for name in names if (version := installed_version(name)) is not None}
    return Run(
        environment,
        datetime.now(UTC).date().isoformat(),
        platform.python_version(),
        {name: public(version) for name, version in sorted(found.items())},
        passed=len(stats.get("passed", ())),
        failed=len(stats.get("failed", ())) + len(stats.get("error", ())),
        skipped=len(stats.get("skipped", ())),
    )


def write(run: Run, file: Path = FILE) -> None:
    """Put the run into the file."""
    file.write_text(with_run(file.read_text(encoding="utf-8"), run), encoding="utf-8")
