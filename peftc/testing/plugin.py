"""The pytest plugin: gives a test that asks for `peftc_case` one run per conformance check of the methods it is marked with.

`peftc.testing.conformance()` makes such a test. pytest loads this file in every run, so it imports nothing else.
"""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    text = (
        "peftc(*plugins): PEFT types or plugin modules to run the conformance checks on; all installed if none is given"
    )
    config.addinivalue_line("markers", text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run per case. A plugin that cannot be loaded is an error of collection that says why."""
    if "peftc_case" not in metafunc.fixturenames:
        return
    from peftc.testing.kit import cases

    marks = list(metafunc.definition.iter_markers("peftc"))
    metafunc.parametrize("peftc_case", cases(*(plugin for mark in marks for plugin in mark.args)), ids=str)
