"""Warnings as other programs carry them from one process to another."""

from __future__ import annotations

import pytest

from peftc import rules
from peftc.diagnostics import PeftcWarning, Rule, Severity

WARNINGS = [rule for rule in vars(rules).values() if isinstance(rule, Rule) and rule.severity is Severity.WARNING]


@pytest.mark.parametrize("rule", WARNINGS, ids=lambda rule: rule.code)
def test_a_warning_can_be_made_anew_from_its_arguments(rule: Rule) -> None:
    one = PeftcWarning(rule("something", fix="Do something."))
    other = type(one)(*one.args)
    assert (type(other), str(other), other.diagnostic) == (type(one), str(one), one.diagnostic)
