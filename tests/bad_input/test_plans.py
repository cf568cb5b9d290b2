"""Plans that do not fit the model, or are no plans any more, and checks of a spec that do not hold: each is told.

Every case has a mutation, a small defect put into the compiler, under which the diagnostic does not come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from peftc import rules
from peftc.compiler import of_spec
from peftc.compiler.plan import drift, serial
from peftc.config.sections import BaseSection, ChecksSection
from peftc.config.spec import AdapterSpec
from tests.bad_input.told import Case, examine
from tests.defects import put_defect
from tests.unit import plans
from tests.unit.plans import SampleConfig, and_modules, decoder, linear


def sample(**config: Any) -> SampleConfig:
    return SampleConfig(**{"target_modules": ["q_proj"], **config})


def spec(**checks: Any) -> Callable[[], Any]:
    made = AdapterSpec.model_construct(
        version=1,
        base=BaseSection(model="a/b"),
        adapters={"default": sample()},
        active=None,
        checks=ChecksSection(**checks),
    )
    return lambda: of_spec.compile_spec(made, decoder(), registry=plans.registry())


def drifted(graph: Any) -> Callable[[], Any]:
    def act() -> Any:
        return drift.differences(plans.planned(decoder(), target_modules=["q_proj"]), graph)

    return act


def read(change: Callable[[dict[str, Any]], None], sign: bool = True) -> Callable[[], Any]:
    """Read a plan that was changed; with `sign` its digest is made to fit."""

    def act() -> Any:
        data = serial.plan_to_json(plans.planned(decoder(), target_modules=["q_proj"]))
        change(data)
        if sign:
            data["digest"] = serial._digest({k: v for k, v in data.items() if k != "digest"})
        return serial.plan_from_json(data, registry=plans.registry())

    return act


CASES: dict[str, Case] = {
    "another number of modules": Case(
        rules.CHECK_FAILED, spec(expect_modules=224), ("adapt 3 modules, not 224", "$.checks.expect_modules"),
        (of_spec, "    if checks.expect_modules not in (None, modules):", "    if False:"),
    ),
    "another number of parameters": Case(
        rules.CHECK_FAILED, spec(expect_trainable="9.2M"), ("trains 384 parameters, not 9.2M", "$.checks.expect_trainable"),
        (of_spec, "    if bounds is not None and", "    if False and"),
    ),
    "a model with fewer layers": Case(
        rules.PLAN_DRIFTED, drifted(replace(decoder(), nodes=tuple(n for n in decoder().nodes if not n.path.startswith("model.layers.2")))),
        ("There is no `model.layers.2.self_attn.q_proj`",),
        (drift, "        if node is None:", "        if False and node is None:"),
    ),
    "a model of another width": Case(
        rules.PLAN_DRIFTED, drifted(decoder(width=4)), ("`model.layers.{0..2}.self_attn.q_proj` maps 4→4, not 8→8",),
        (drift, "        elif node.facts != site.layer:", "        elif False:"),
    ),
    "a model of another dtype": Case(
        rules.PLAN_DRIFTED, drifted(decoder(dtype="bfloat16")), ("weight [8, 8] bfloat16, not weight [8, 8] float32",),
        (drift, "        elif node.facts != site.layer:", "        elif False:"),
    ),
    "a model with more": Case(
        rules.PLAN_DRIFTED, drifted(and_modules(decoder(), {"score": linear(8, 2)})), ("parameters, not",),
        (drift, "    if graph.numel != plan.base_numel:", "    if False:"),
    ),
    "an edited plan": Case(
        rules.PLAN_INVALID, read(lambda data: data.update(total=1), sign=False), ("changed after it was written",),
        (serial, '    if data.get("digest") != digest:', "    if False:"),
    ),
    "a plan of another version": Case(
        rules.PLAN_INVALID, read(lambda data: data.update(version=2)), ("version 2", "reads 1"),
        (serial, '    if data.get("version") != VERSION:', "    if False:"),
    ),
    "another document": Case(
        rules.PLAN_INVALID, read(lambda data: data.update(format="peftc.graph")), ("`format: peftc.plan`",),
        (serial, 'or data.get("format") != FORMAT:', "or False:"),
    ),
    "a plan that lacks something": Case(
        rules.PLAN_INVALID, read(lambda data: data["adapters"][0].pop("maps")), ("`maps` is missing", "$.adapters[0].maps"),
        (serial, "    if differs:", "    if False:"),
    ),
    "a plan of other types": Case(
        rules.PLAN_INVALID, read(lambda data: data["adapters"][0]["kinds"][0]["slots"][0].update(shape=["x", 2])),
        ("`\"x\"` does not fit", "$.adapters[0].kinds[0].slots[0].shape[0]"),
        (serial, "    if differs:", "    if False:"),
    ),
    "a plan without adapters": Case(
        rules.PLAN_INVALID, read(lambda data: data.update(adapters=[], active=[])), ("$.adapters",),
        (serial, "    if differs:", "    if False:"),
    ),
    "a plan with a tensor beyond all memory": Case(
        rules.PLAN_INVALID, read(lambda data: data["adapters"][0]["kinds"][0]["slots"][0].update(shape=[2**62, 2**62])),
        ("has 2.1e+37 numbers",),
        (serial, "    except (KeyError, TypeError, ValueError,", "    except (KeyError, TypeError,"),
    ),
    "a plan that trains whole numbers": Case(
        rules.PLAN_INVALID, read(lambda data: data["adapters"][0]["kinds"][0]["slots"][0].update(dtype="int64")),
        ("no gradient moves numbers of int64",),
        (serial, '    if data["trainable"] and', "    if False and"),
    ),
    "a plan whose adapter is of whole numbers": Case(
        rules.PLAN_INVALID, read(lambda data: data["adapters"][0]["kinds"][0].update(dtype="int64")),
        ("$.adapters[0].kinds[0].dtype",),
        (serial, "    if differs:", "    if False:"),
    ),
    "a plan that points nowhere": Case(
        rules.PLAN_INVALID, read(lambda data: data["adapters"][0]["maps"][0].__setitem__(1, 99)), ("IndexError",),
        (serial, "ValueError, IndexError,", "ValueError,"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_told(name: str) -> None:
    examine(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_test_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    put_defect(monkeypatch, *case.defect)
    with pytest.raises(Exception):  # noqa: B017 - an assertion fails, or what the defect lets through does
        examine(case)
