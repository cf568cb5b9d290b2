"""Schemas: generated from the configs, committed, and in agreement with pydantic but for the differences that are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from peftc import rules
from peftc.config.files import check_config
from peftc.config.json_text import parse_json
from peftc.config.places import Location
from peftc.config.yaml_text import parse_yaml
from peftc.registry import shorthand
from peftc.registry.manager import Registry, default_registry
from peftc.schema.generate import (
    bundled,
    file_name,
    method_schema,
    names,
    schema_named,
    spec_schema,
    structure_of,
    structure_of_spec,
    to_text,
)
from peftc.schema.validate import check_document, structure_problems
from peftc.tuner.method import TunerMethod
from tests.unit.fakes import record, registry
from tests.unit.test_spec import GOOD, SMALL

REGISTRY = default_registry()
METHODS = [REGISTRY.get(name) for name in REGISTRY.names]
CANDIDATES = [*METHODS, record()]

STRUCTURES = {m.peft_type: structure_of(m) for m in CANDIDATES}
OURS = registry()

each_method = pytest.mark.parametrize("method", CANDIDATES, ids=lambda m: m.peft_type)

#: values that each option is given; what fits one is wrong for most others
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 8, -1, 2.5, 8.0, 0.5, "", "text", "none", "all", "all-linear", [], ["a"], ["a", "a"], [1],
    [[1, 2]], {}, {"a": 1}, {"a": 8.0}, {"a": "b"}, {"a": [1]}, {"depth": 2}, "CAUSAL_LM", "RANDOM", "two", [None],
)  # fmt: skip


def documents(method: TunerMethod) -> st.SearchStrategy[dict[str, Any]]:
    """Configs of the method, right and wrong, some with a key that it does not have."""
    schema = STRUCTURES[method.peft_type]["properties"]
    fitting = {name: option["enum"] for name, option in schema.items() if "enum" in option}
    options = {name: st.sampled_from((*VALUES, *fitting.get(name, ()))) for name in schema if name != "peft_type"}
    extra = st.dictionaries(st.just("no_such_option"), st.just(1))
    chosen = st.dictionaries(st.sampled_from(sorted(options)), st.just(None), max_size=3).flatmap(
        lambda keys: st.fixed_dictionaries({key: options[key] for key in keys})
    )
    return st.builds(lambda a, b: {"peft_type": method.peft_type, **a, **b}, chosen, extra)


def whole_floats(data: Any) -> bool:
    """Whether there is a number like 8.0, which the schema takes for an integer and pydantic does not."""
    if isinstance(data, dict):
        return any(map(whole_floats, data.values()))
    return any(map(whole_floats, data)) if isinstance(data, list) else isinstance(data, float) and data.is_integer()


def repeated(data: Any) -> bool:
    """Whether a list names something twice, which the schema of a set refuses and pydantic does not."""
    if isinstance(data, dict):
        return any(map(repeated, data.values()))
    return isinstance(data, list) and any(item in data[:i] for i, item in enumerate(data))


def told_at(method: TunerMethod, document: dict[str, Any]) -> tuple[set[Location], set[Location]]:
    """The options that pydantic and the schema object to. What is wrong between options, no schema says."""
    known = REGISTRY if method in METHODS else OURS
    with (
        patch.object(method.config, "contradictions", lambda self: ()),
        patch.object(shorthand, "contradictions", lambda *given: ()),
    ):
        by_pydantic = check_config(document, lenient=False, registry=known)[1]
    by_schema = structure_problems(document, STRUCTURES[method.peft_type])
    return {p.location[:1] for p in by_pydantic if p.location}, {p.location[:1] for p in by_schema}


def differ(method: TunerMethod, document: dict[str, Any]) -> bool:
    """Whether the validators disagree in a way that is not meant."""
    by_pydantic, by_schema = told_at(method, document)
    return by_pydantic != by_schema and not whole_floats(document) and not repeated(document)


def each_alone(method: TunerMethod) -> list[dict[str, Any]]:
    """Every option of the method with every value."""
    names = [name for name in STRUCTURES[method.peft_type]["properties"] if name != "peft_type"]
    return [{"peft_type": method.peft_type, name: value} for name in names for value in VALUES]


@each_method
def test_both_validators_agree_on_every_option_with_every_value(method: TunerMethod) -> None:
    assert [document for document in each_alone(method) if differ(method, document)] == []


def test_a_disagreement_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    method, option = record(), STRUCTURES["FAKE"]["properties"]["rate"]
    monkeypatch.delitem(option, "exclusiveMaximum")
    assert [d["rate"] for d in each_alone(method) if differ(method, d)] == [1, 8, 2.5]


@each_method
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_both_validators_agree_on_any_config(method: TunerMethod, data: st.DataObject) -> None:
    document = data.draw(documents(method))
    assert not differ(method, document)


def test_the_two_differences_are_what_they_are_said_to_be() -> None:
    whole = {"peft_type": "FAKE", "r": 8.0}
    assert [p.location for p in check_config(whole, lenient=False, registry=registry())[1]] == [("r",)]
    assert list(structure_problems(whole, structure_of(record()))) == []
    twice = {"peft_type": "FAKE", "target_modules": ["a", "a"]}
    assert check_config(twice, lenient=False, registry=registry())[1] == []
    (found,) = structure_problems(twice, structure_of(record()))
    assert (found.location, found.diagnostic.code) == (("target_modules", 1), rules.DUPLICATE_MEMBER.code)


@each_method
def test_examples_fit_their_schema(method: TunerMethod) -> None:
    for example in ({}, *method.examples):
        document = method.least(**example).to_json()
        assert [p.diagnostic.what for p in structure_problems(document, method_schema(method))] == []


# the files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names(REGISTRY))
def test_a_committed_schema_is_what_the_configs_say(name: str, root: Path) -> None:
    text = (root / "schemas" / file_name(name)).read_text(encoding="utf-8")
    assert text == to_text(schema_named(name, REGISTRY)), "run `peftc schema --write`"


def test_no_schema_is_left_over(root: Path) -> None:
    committed = {path.name for path in (root / "schemas").glob("*.json")}
    assert committed == {file_name(name) for name in names(REGISTRY)}


@pytest.mark.parametrize("name", names(REGISTRY))
def test_a_schema_is_canonical_and_valid(name: str) -> None:
    schema = schema_named(name, REGISTRY)
    Draft202012Validator.check_schema(schema)
    text = to_text(schema)
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert schema["$id"].endswith(name)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@each_method
def test_every_option_has_its_meaning_in_the_schema(method: TunerMethod) -> None:
    schema = method_schema(method)
    assert [name for name, option in schema["properties"].items() if not option.get("description")] == []
    assert "\n" not in json.dumps([option["description"] for option in schema["properties"].values()])


def test_options_for_python_only_are_not_in_a_schema() -> None:
    assert "runtime" not in method_schema(record())["properties"]


# what an editor gets -------------------------------------------------------------------------------------------------


def errors(data: Any) -> list[str]:
    found = Draft202012Validator(spec_schema(REGISTRY)).iter_errors(data)
    return sorted(".".join(map(str, e.absolute_path)) for e in found)


def a_spec(**adapter: Any) -> dict[str, Any]:
    return {"version": 1, "base": "a/b", "adapters": {"x": adapter}}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.peft_type)
def test_the_spec_schema_checks_an_adapter_by_its_type(method: TunerMethod) -> None:
    for example in ({}, *method.examples):
        assert errors(a_spec(peft_type=method.peft_type, **example)) == []
    assert errors(a_spec(peft_type=method.peft_type, no_such_option=1)) == ["adapters.x"]
    assert errors(a_spec(peft_type=method.peft_type, inference_mode="yes")) == ["adapters.x.inference_mode"]


def test_the_spec_schema_lets_other_peoples_types_pass() -> None:
    assert errors(a_spec(peft_type="FAKE", anything=1)) == []
    assert errors(a_spec()) == ["adapters.x"]


def test_the_spec_schema_knows_every_section() -> None:
    good = {**GOOD, "adapters": {name: {"peft_type": "FAKE"} for name in GOOD["adapters"]}}
    assert errors(good) == []
    assert errors({**good, "train": {"data": "d", "step": 1}}) == ["train"]
    assert errors({**good, "version": 2}) == ["version"]
    assert errors({"version": 1}) == ["", ""]


def test_every_bundled_type_is_offered_with_its_meaning() -> None:
    offered = spec_schema(REGISTRY)["$defs"]["Adapter"]["properties"]["peft_type"]["anyOf"]
    assert [option["const"] for option in offered if "const" in option] == bundled(REGISTRY)
    assert all(option["description"] for option in offered)


def test_only_methods_of_this_distribution_are_bundled() -> None:
    made = Registry([*REGISTRY.claims, *registry().claims], blocked=frozenset())
    made.register(__import__("tests.unit.fakes", fromlist=["plugin"]).plugin(record()), "fake")
    assert "FAKE" in made.names
    assert "FAKE" not in bundled(made)


# one list ------------------------------------------------------------------------------------------------------------


def test_each_mistake_is_told_once() -> None:
    text = SMALL.replace("FAKE", "FAKE, r: 0, rats: 1, mode: three, inner: {dept: 1}") + "chekcs: {}\nactive: x\n"
    found = check_document(parse_yaml(text, "f"), registry()).diagnostics
    assert [d.where.path for d in found] == [
        "$.adapters.default.r",
        "$.adapters.default.rats",
        "$.adapters.default.mode",
        "$.adapters.default.inner.dept",
        "$.chekcs",
        "$.active",
    ]


def test_what_only_the_schema_sees_is_told_with_its_line() -> None:
    text = SMALL.replace("FAKE", "FAKE, target_modules: [a, b, a]")
    verdict = check_document(parse_yaml(text, "f"), registry())
    (found,) = verdict.diagnostics
    assert (found.code, str(found.where)) == (
        rules.DUPLICATE_MEMBER.code,
        "f:3:62 at `$.adapters.default.target_modules[2]`",
    )
    assert verdict.ok
    assert verdict.spec is not None


def test_a_plain_config_is_checked_by_both(tmp_path: Path) -> None:
    document = parse_json('{"peft_type": "FAKE", "r": 0, "later": 1}', "adapter_config.json")
    found = check_document(document, registry()).diagnostics
    assert [(d.code, d.where.path) for d in found] == [
        (rules.BAD_VALUE.code, "$.r"),
        (rules.DROPPED_KEY.code, "$.later"),
    ]


def test_a_type_of_another_distribution_is_checked_with_a_schema_made_at_run_time() -> None:
    assert structure_of(record())["properties"]["peft_type"]["const"] == "FAKE"
    assert check_document(parse_yaml(SMALL, "f"), registry()).ok


def test_the_structure_of_a_spec_leaves_adapters_to_their_methods() -> None:
    assert list(structure_problems(a_spec(peft_type="ANY", x=1), structure_of_spec())) == []
