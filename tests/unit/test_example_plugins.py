"""The plugins in `examples/plugins` are short, whole, and pass the kit as they stand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from peftc.registry.manager import default_registry
from peftc.testing.kit import chosen, report_of

#: File -> the most lines that it has, blank ones not counted.
LONGEST = {"ssf.py": 25, "bottleneck.py": 40}


@pytest.fixture(params=LONGEST)
def plugin(root: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    name = Path(request.param).stem
    monkeypatch.syspath_prepend(str(root / "examples" / "plugins"))
    module = importlib.import_module(name)
    yield module
    default_registry().forget(module.peftc_tuner().peft_type)
    del sys.modules[name]


def test_an_example_is_short(root: Path) -> None:
    found = {path.name: path for path in (root / "examples" / "plugins").glob("*.py")}
    assert found.keys() == LONGEST.keys()
    lines = {name: sum(bool(line.strip()) for line in path.read_text().splitlines()) for name, path in found.items()}
    assert all(lines[name] <= most for name, most in LONGEST.items()), lines


def test_an_example_passes_every_check(plugin: ModuleType) -> None:
    report = report_of([case for case in chosen(plugin) if case.subject.model.name in ("mlp", "embedding")])
    assert not report.findings, str(report)
