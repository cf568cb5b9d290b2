"""The conformance kit: what every method must do, as checks that a plugin's author runs with one call.

In a test file `test_conformance = conformance("MY_TYPE")` is one test per check, options and model; anywhere else
`check("MY_TYPE")` runs them all and raises with what is wrong. Importing this needs neither torch nor pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.testing.report import Report


def check(plugin: str | ModuleType, *only: str) -> Report:
    """Run the checks on a method and return the report; with `only`, those of that name.

    `plugin` is the PEFT type of an installed method, or the module of one that is not installed. Raises `PeftcError` with
    every finding, and for a plugin that cannot be loaded.
    """
    return examine(plugin, *only).require()


def examine(plugin: str | ModuleType, *only: str) -> Report:
    """The same, but findings are only reported. Raises `PeftcError` for a plugin that cannot be loaded."""
    from peftc.testing.kit import examine as run

    return run(plugin, only)


def conformance(*plugins: str | ModuleType) -> Callable[[Any], None]:
    """A test function for pytest: one test per method, check, options and model. Without plugins: all installed methods.

    Needs the pytest plugin `peftc.testing.plugin`, which pytest finds by itself where peftc is installed.
    """
    import pytest

    @pytest.mark.peftc(*plugins)
    def test_conformance(peftc_case: Any) -> None:
        __tracebackhide__ = True
        peftc_case.run()

    return test_conformance
