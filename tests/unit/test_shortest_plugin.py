"""The plugin that README shows is whole: it passes every check of the kit, as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from peftc.registry.manager import default_registry
from peftc.testing.kit import chosen, report_of


def test_the_shortest_plugin_passes_every_check(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (source,) = [block for block in blocks if "peftc_tuner" in block]
    (tmp_path / "shortest_plugin.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import shortest_plugin  # type: ignore[import-not-found]

    found = chosen(shortest_plugin)
    names = {case.subject.model.name for case in found}
    assert len(names) > 3, "it is checked on other models than the first"
    small = [case for case in found if case.subject.model.name in ("mlp",)]
    report = report_of(small)
    default_registry().forget("SCALE")
    sys.modules.pop("shortest_plugin")
    assert not report.findings, str(report)
