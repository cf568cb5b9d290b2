"""The hand-written schema of plans holds for real plans of every method, and for nothing that is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.serial import plan_to_json
from peftc.registry.manager import default_registry
from peftc.schema.generate import PLAN, schema_named
from tests.unit.adapters import config_of, examples, graph_for

EXAMPLES = list(examples())
VALIDATOR = Draft202012Validator(schema_named(PLAN, default_registry()))


def plan(method: Any, example: dict[str, Any]) -> dict[str, Any]:
    return plan_to_json(compile_plan(graph_for(method), {"default": config_of(method, example)}))


@pytest.mark.parametrize(("method", "example"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_a_real_plan_fits(method: Any, example: dict[str, Any]) -> None:
    assert [e.message for e in VALIDATOR.iter_errors(plan(method, example))] == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("format",), "other"),
        (("version",), 2),
        (("trainable",), -1),
        (("digest",), "x"),
        (("more",), 1),
        (("adapters", 0, "maps"), [["path"]]),
        (("adapters", 0, "maps"), [["path", 0, 0]]),
        (("adapters", 0, "more"), 1),
        (("adapters", 0, "trains"), [["path", "bias"]]),
    ],
)
def test_what_is_no_plan_does_not_fit(place: tuple[Any, ...], value: Any) -> None:
    data: Any = copy.deepcopy(plan(*EXAMPLES[0][1:]))
    holder = data
    for part in place[:-1]:
        holder = holder[part]
    holder[place[-1]] = value
    assert not VALIDATOR.is_valid(data)
