"""Every kind of diagnostic has its own code, in the range of its subject, and a test that provokes it."""

from __future__ import annotations

import re

import pytest

from peftc import rules
from peftc.diagnostics import Rule
from tests.architecture.tree import sources

RULES = {name: value for name, value in vars(rules).items() if isinstance(value, Rule)}


def test_codes_are_unique_and_well_formed() -> None:
    codes = [rule.code for rule in RULES.values()]
    assert len(codes) == len(set(codes)), sorted(c for c in codes if codes.count(c) > 1)
    assert [c for c in codes if not re.fullmatch(r"PC[1-8]\d\d", c)] == []


def test_codes_stand_in_order() -> None:
    codes = [rule.code for rule in RULES.values()]
    assert codes == sorted(codes)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_used(name: str) -> None:
    users = [s.name for s in sources("peftc", "plugins") if re.search(rf"\brules\.{name}\b", s.text)]
    assert users, f"nothing raises rules.{name}: remove it"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_provoked_by_a_test(name: str) -> None:
    code = RULES[name].code
    wanted = re.compile(rf"\brules\.{name}\b|\b{code}\b")
    tests = [s.name for s in sources("tests") if wanted.search(s.text) and "architecture" not in s.name]
    assert tests, f"no test provokes {code} (rules.{name})"
