"""What bad input to the compiler comes to: a case, and how it is examined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from peftc import rules
from peftc.compiler.plan.plan import InjectionPlan
from peftc.diagnostics import Diagnostic, PeftcError, Rule, Severity


@dataclass(frozen=True)
class Case:
    """Something bad, what is said about it, and the defect (module, text, other text) that would keep it from being said."""

    rule: Rule
    act: Callable[[], Any]
    says: tuple[str, ...]
    defect: tuple[ModuleType, str, str]
    severity: Severity = Severity.ERROR


def provoke(act: Callable[[], Any]) -> list[Diagnostic]:
    """All that is reported, as an error or as warnings of a plan."""
    try:
        result = act()
    except PeftcError as error:
        return list(error.diagnostics)
    return list(result.warnings if isinstance(result, InjectionPlan) else result or ())


def examine(case: Case) -> None:
    """The case's diagnostic comes, once, with its severity and its words."""
    found = [d for d in provoke(case.act) if d.code == case.rule.code]
    assert len(found) == 1 or (found and case.rule is rules.PLAN_DRIFTED)  # a model mostly differs in several ways
    assert found[0].severity is case.severity
    text = str(found[0])
    assert [words for words in case.says if words not in text] == []
    assert found[0].fix
    assert found[0].where != type(found[0].where)() or case.rule in PLACELESS


#: Diagnostics about the model or the plan as a whole.
PLACELESS = {rules.NO_EMBEDDINGS, rules.PLAN_DRIFTED, rules.PLAN_INVALID, rules.MIXED_TYPES}


def warned(rule: Rule, act: Callable[[], Any], says: tuple[str, ...], defect: tuple[ModuleType, str, str]) -> Case:
    return Case(rule, act, says, defect, Severity.WARNING)
