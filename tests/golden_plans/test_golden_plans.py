"""Whole plans of whole models, as JSON and as people see them, compared to the letter.

A folder is a model: `graph.json` (from `peftc graph MODEL --out graph.json`) and specs `NAME.spec.yaml` with what they come to,
`NAME.plan.json` and `NAME.txt`. `pytest tests/golden_plans --rewrite-golden` writes these anew; review the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftc.compiler.of_spec import compile_spec
from peftc.compiler.plan.files import read_graph
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.render import render_plan
from peftc.compiler.plan.serial import plan_from_text, plan_to_text
from peftc.config.spec import load_spec

HERE = Path(__file__).parent
SPECS = sorted(HERE.glob("*/*.spec.yaml"))
NAMES = [f"{spec.parent.name}/{spec.name.removesuffix('.spec.yaml')}" for spec in SPECS]


def compiled(spec: Path) -> InjectionPlan:
    return compile_spec(load_spec(spec)[0], read_graph(spec.parent / "graph.json"))


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_the_one_on_record(name: str, request: pytest.FixtureRequest) -> None:
    plan = compiled(HERE / f"{name}.spec.yaml")
    told = {HERE / f"{name}.plan.json": plan_to_text(plan), HERE / f"{name}.txt": render_plan(plan)}
    for file, text in told.items():
        if request.config.getoption("--rewrite-golden"):
            file.write_text(text, encoding="utf-8")
        assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_on_record_can_be_read(name: str) -> None:
    text = (HERE / f"{name}.plan.json").read_text(encoding="utf-8")
    assert plan_from_text(text) == compiled(HERE / f"{name}.spec.yaml")
    assert json.loads(text)["trainable"] == compiled(HERE / f"{name}.spec.yaml").counts()[0]


def test_every_model_has_a_plan() -> None:
    assert {graph.parent for graph in HERE.glob("*/graph.json")} == {spec.parent for spec in SPECS}
