"""Every diagnostic has a mutation: when it is told wrongly, a test fails. So that test can fail.

Most rules have a defect of their own beside the test that provokes them (`put_defect`). The others are silenced one
after the other, all in one pytest process: each around the one test that `silence.PROVOKED` names for it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from peftc import rules
from peftc.diagnostics import Rule
from tests.mutation.silence import PROVOKED

RULES = {name: value for name, value in vars(rules).items() if isinstance(value, Rule)}


@pytest.fixture(scope="module")
def ended(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How each test ended while its rule was silenced."""
    results = tmp_path_factory.mktemp("silenced") / "ended.json"
    pytest_silenced = [sys.executable, "-m", "pytest", "-p", "tests.mutation.silence", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_silenced, "--silenced", str(results), *PROVOKED.values()],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    found: dict[str, str] = json.loads(results.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", PROVOKED)
def test_a_silenced_rule_is_noticed(name: str, ended: dict[str, str]) -> None:
    assert ended.get(PROVOKED[name]) == "call failed"


@cache
def defects() -> str:
    """All files of tests that put defects into peftc."""
    files = (path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    return "\n".join(text for text in files if "put_defect(" in text)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_a_mutation(name: str) -> None:
    named = re.compile(rf"\brules\.{name}\b|\b{RULES[name].code}\b")
    assert named.search(defects()) or name in PROVOKED, f"no mutation shows that a test of rules.{name} can fail"
