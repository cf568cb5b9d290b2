"""Every kind of diagnostic has its own code, in the range of its subject, and a test that provokes it."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module

import pytest

from peftc import rules
from peftc.diagnostics import Rule
from tests.architecture.tree import sources

RULES = {name: value for name, value in vars(rules).items() if isinstance(value, Rule)}


def test_codes_are_unique_and_well_formed() -> None:
    codes = [rule.code for rule in RULES.values()]
    assert len(codes) == len(set(codes)), sorted(c for c in codes if codes.count(c) > 1)
    assert [c for c in codes if not re.fullmatch(r"PC[1-8]\d\d", c)] == []


@pytest.mark.parametrize("name", sorted({source.module for source in sources("peftc/rules")}))
def test_codes_stand_in_order_in_the_file_of_their_hundred(name: str) -> None:
    own = [rule.code for rule in vars(import_module(name)).values() if isinstance(rule, Rule)]
    if name != rules.__name__:
        assert own == sorted(own) and len({code[:3] for code in own}) <= 1


@cache
def named(*folders: str) -> set[str]:
    """Names of rules, and codes, that stand in files of these folders, but for tests of the architecture."""
    texts = (source.text for source in sources(*folders) if not source.name.startswith("tests/architecture/"))
    return {word for text in texts for word in re.findall(r"\brules\.\w+|\bPC\d{3}\b", text)}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_used(name: str) -> None:
    assert f"rules.{name}" in named("peftc", "plugins"), f"nothing raises rules.{name}: remove it"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_provoked_by_a_test(name: str) -> None:
    code = RULES[name].code
    assert {f"rules.{name}", code} & named("tests"), f"no test provokes {code} (rules.{name})"
