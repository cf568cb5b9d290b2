"""Specs: what a document says, in which ways, and that all its problems come at once, each with its line."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc import rules
from peftc.config.base import CONFIG_NAME
from peftc.config.sections import ChecksSection, TrainSection
from peftc.config.spec import AdapterSpec, load_spec, read_spec
from peftc.config.types import TaskType
from peftc.config.yaml_text import parse_yaml
from peftc.diagnostics import ConfigError, Diagnostic, PeftcError
from peftc.graph.base_ref import BaseRef
from tests.unit.fakes import FakeConfig, registry

SMALL = "version: 1\nbase: owner/model\nadapters: {default: {peft_type: FAKE}}\n"


def read(text: str, folder: Path, name: str = "spec.yaml", **options: Any) -> AdapterSpec:
    (folder / name).write_text(text)
    return load_spec(folder / name, registry=registry(), **options)[0]


def problems(text: str) -> tuple[Diagnostic, ...]:
    reading = read_spec(parse_yaml(text, "spec.yaml"), registry())
    assert reading.spec is None
    return reading.diagnostics


def test_a_small_spec(tmp_path: Path) -> None:
    spec = read(SMALL, tmp_path)
    assert spec.base_ref == BaseRef(model="owner/model")
    assert spec.adapters == {"default": FakeConfig()}
    assert (spec.active_names, spec.train, spec.checks, spec.output) == (("default",), None, None, None)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("owner/name", {"model": "owner/name"}),
        ("./local", {"path": "{}/local"}),
        ("/abs/local", {"path": "/abs/local"}),
        ("a/model.GGUF", {"gguf": "{}/a/model.GGUF"}),
        ("big.json", {"config": "{}/big.json"}),
        ("{model: owner/name, revision: main, dtype: bfloat16}", {"model": "owner/name", "revision": "main", "dtype": "bfloat16"}),
        ("{distribution: some-dist, file: x.gguf}", {"distribution": "some-dist", "file": "x.gguf"}),
        ("{config: {model_type: x, n: 2}}", {"config": {"model_type": "x", "n": 2}}),
        ("{path: local, task_type: SEQ_CLS}", {"path": "{}/local", "task_type": "SEQ_CLS"}),
    ],
)  # fmt: skip
def test_ways_to_name_a_base(tmp_path: Path, base: str, expected: dict[str, Any]) -> None:
    spec = read(SMALL.replace("owner/model", base), tmp_path)
    filled = {k: v.replace("{}", str(tmp_path)) if isinstance(v, str) else v for k, v in expected.items()}
    assert spec.base_ref == BaseRef(**filled)


def test_paths_start_at_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "a.yaml").write_text(SMALL + "train: {data: d.jsonl}\noutput: out\n")
    monkeypatch.chdir(tmp_path)
    spec, _ = load_spec("specs/a.yaml", registry=registry())
    assert spec.train is not None
    assert spec.resolve(spec.train.data) == Path("specs/d.jsonl")
    assert spec.resolve("/abs") == Path("/abs")


def test_the_task_of_the_base_holds_for_adapters(tmp_path: Path) -> None:
    spec = read(SMALL.replace("owner/model", "{model: a/b, task_type: CAUSAL_LM}"), tmp_path)
    assert spec.adapters["default"].task_type is TaskType.CAUSAL_LM


def test_the_task_of_an_adapter_holds_for_the_base(tmp_path: Path) -> None:
    spec = read(SMALL.replace("FAKE", "FAKE, task_type: TOKEN_CLS"), tmp_path)
    assert spec.base_ref.task_type is TaskType.TOKEN_CLS


def test_the_first_adapter_is_active_unless_the_spec_says_otherwise(tmp_path: Path) -> None:
    two = SMALL.replace("{default: {peft_type: FAKE}}", "{b: {peft_type: FAKE}, a: {peft_type: FAKE}}")
    assert read(two, tmp_path).active_names == ("b",)
    assert read(two + "active: [a, b]\n", tmp_path).active_names == ("a", "b")


def test_training_has_defaults_that_need_no_model() -> None:
    train = TrainSection(data="d.jsonl")
    assert (train.epochs, train.steps, train.learning_rate, train.batch_size, train.seed) == (None, None, 1e-4, 8, 0)


@pytest.mark.parametrize(
    ("said", "low", "high"),
    [(9_232_384, 9_232_384, 9_232_384), ("9.2M", 9_150_000, 9_249_999), ("350K", 349_500, 350_499), ("12", 12, 12),
     ("1.05B", 1_045_000_000, 1_054_999_999), ("0", 0, 0)],
)  # fmt: skip
def test_a_rounded_count_admits_what_rounds_to_it(said: int | str, low: int, high: int) -> None:
    assert ChecksSection(expect_trainable=said).trainable_bounds() == (low, high)


def test_no_expectation_has_no_bounds() -> None:
    assert ChecksSection().trainable_bounds() is None


@pytest.mark.parametrize("said", ["9.2Q", "1.5", "1.2345K", "-3", "9,000", True, -1, 2.5])
def test_a_count_must_be_one(said: object) -> None:
    with pytest.raises(ConfigError):
        ChecksSection(expect_trainable=said)


def test_all_problems_come_at_once_in_the_order_of_the_lines() -> None:
    text = """\
version: 1
base: {model: a/b, path: ./x, trust_remote_code: true}
adapters:
  one: {peft_type: FAKE, r: 0, rats: 1, inner: {dept: 2}, target_modules: [a, 3], pattern: {x: y}}
  bad.name: {peft_type: FAKEE}
  two: {peft_type: FAKE, mode: two, rate: 0.5}
  three: {}
active: [onee, two, two]
train: {data: d, steps: 1, epochs: 2, learning_rate: fast}
chekcs: {}
"""
    found = problems(text)
    assert [(d.code, d.where.line, d.where.path) for d in found] == [
        (rules.CONTRADICTION.code, 2, "$.base.path"),
        (rules.UNKNOWN_KEY.code, 2, "$.base.trust_remote_code"),
        (rules.BAD_VALUE.code, 4, "$.adapters.one.r"),
        (rules.UNKNOWN_KEY.code, 4, "$.adapters.one.rats"),
        (rules.UNKNOWN_KEY.code, 4, "$.adapters.one.inner.dept"),
        (rules.BAD_VALUE.code, 4, "$.adapters.one.target_modules[1]"),
        (rules.BAD_VALUE.code, 4, "$.adapters.one.pattern.x"),
        (rules.ADAPTER_NAME.code, 5, '$.adapters["bad.name"]'),
        (rules.UNKNOWN_TYPE.code, 5, '$.adapters["bad.name"].peft_type'),
        (rules.CONTRADICTION.code, 6, "$.adapters.two.rate"),
        (rules.MISSING_KEY.code, 7, "$.adapters.three"),
        (rules.UNKNOWN_ADAPTER.code, 8, "$.active[0]"),
        (rules.CONTRADICTION.code, 8, "$.active[2]"),
        (rules.CONTRADICTION.code, 9, "$.train.steps"),
        (rules.BAD_VALUE.code, 9, "$.train.learning_rate"),
        (rules.UNKNOWN_KEY.code, 10, "$.chekcs"),
    ]
    fixes = {d.where.path: d.fix for d in found}
    assert "`rate`" in fixes["$.adapters.one.rats"]
    assert "Did you mean `depth`?" in fixes["$.adapters.one.inner.dept"]
    assert "Did you mean `checks`?" in fixes["$.chekcs"]
    assert "Did you mean `one`?" in fixes["$.active[0]"]
    assert "Did you mean `FAKE`?" in fixes['$.adapters["bad.name"].peft_type']


def test_each_problem_stands_at_its_column() -> None:
    (found,) = problems(SMALL.replace("FAKE", "FAKE, r: 0"))
    assert str(found.where) == "spec.yaml:3:42 at `$.adapters.default.r`"


def test_remote_code_has_no_key_and_says_why() -> None:
    (found,) = problems(SMALL.replace("owner/model", "{model: a/b, trust_remote_code: false}"))
    assert "never switched on by a file" in found.why


def test_an_exception_in_the_methods_check_is_a_diagnostic() -> None:
    (found,) = problems(SMALL.replace("FAKE", "FAKE, rate: 0.99"))
    assert (found.code, found.where.path) == (rules.PLUGIN_RAISED.code, "$.adapters.default")


def test_an_option_for_python_cannot_stand_in_a_file() -> None:
    (found,) = problems(SMALL.replace("FAKE", "FAKE, runtime: 1"))
    assert (found.code, found.where.path) == (rules.UNKNOWN_KEY.code, "$.adapters.default.runtime")


def test_tasks_must_agree() -> None:
    text = SMALL.replace("owner/model", "{model: a/b, task_type: CAUSAL_LM}").replace(
        "FAKE", "FAKE, task_type: SEQ_CLS"
    )
    (found,) = problems(text)
    assert (found.code, found.where.path) == (rules.CONTRADICTION.code, "$.adapters.default.task_type")


@pytest.mark.parametrize("text", ["", "- a\n", "text\n", "1\n"])
def test_a_document_that_is_no_mapping(text: str) -> None:
    (found,) = problems(text)
    assert found.code == rules.WRONG_DOCUMENT.code


def test_a_spec_made_in_python() -> None:
    config = FakeConfig(r=2)
    spec = AdapterSpec(version=1, base={"model": "a/b", "task_type": "CAUSAL_LM"}, adapters={"x": config})
    assert spec.active_names == ("x",)
    assert spec.adapters["x"].task_type is TaskType.CAUSAL_LM
    assert config.task_type is None


def test_a_spec_made_in_python_is_checked() -> None:
    config = FakeConfig()
    config.r = 0
    with pytest.raises(ConfigError) as caught:
        AdapterSpec(version=1, base="a/b", adapters={"x": config})
    assert [d.where.path for d in caught.value.diagnostics] == ["adapters.x.r"]
    with pytest.raises(ConfigError) as caught:
        AdapterSpec(version=1, base="a/b", adapters={"x": FakeConfig()}, active=["y"])
    assert [d.where.path for d in caught.value.diagnostics] == ["active[0]"]


# plain adapter configs -----------------------------------------------------------------------------------------------


def test_a_plain_config_becomes_a_spec_with_a_base_given_here(tmp_path: Path) -> None:
    text = json.dumps({"peft_type": "FAKE", "r": 3, "task_type": "CAUSAL_LM"})
    spec = read(text, tmp_path, CONFIG_NAME, base="./model")
    assert spec.base_ref == BaseRef(path="model", task_type=TaskType.CAUSAL_LM)
    assert spec.adapters == {"default": FakeConfig(r=3, task_type="CAUSAL_LM")}


def test_a_plain_config_may_name_its_base(tmp_path: Path) -> None:
    text = json.dumps({"peft_type": "FAKE", "base_model_name_or_path": "a/b", "revision": "v2"})
    assert read(text, tmp_path, CONFIG_NAME).base_ref == BaseRef(model="a/b", revision="v2")


def test_a_plain_config_without_a_base_says_so(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="--base"):
        read(json.dumps({"peft_type": "FAKE"}), tmp_path, CONFIG_NAME)


def test_a_librarys_file_is_read_leniently_and_a_persons_strictly(tmp_path: Path) -> None:
    text = json.dumps({"peft_type": "FAKE", "rr": 3, "base_model_name_or_path": "a/b"})
    (tmp_path / CONFIG_NAME).write_text(text)
    _, (warning,) = load_spec(tmp_path / CONFIG_NAME, registry=registry())
    assert (warning.code, warning.where.path) == (rules.DROPPED_KEY.code, "$.rr")
    with pytest.raises(PeftcError, match="no option `rr`"):
        read(text, tmp_path, "mine.json")


# any document --------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "version": 1,
    "base": {"model": "a/b", "task_type": "CAUSAL_LM"},
    "adapters": {
        "x": {"peft_type": "FAKE", "r": 2, "target_modules": ["a", "b"], "pattern": {"p": 1}, "inner": {"depth": 2}},
        "y": {"peft_type": "FAKE", "target_modules": "all-linear"},
    },
    "active": ["y"],
    "train": {"data": "d.jsonl", "steps": 3, "learning_rate": 0.1, "device": "cuda:1"},
    "checks": {"expect_modules": 3, "expect_trainable": "1.2M", "allow_dead_targets": ["z"]},
    "output": "out",
}
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    3.5,
    "",
    "text",
    [],
    {},
    [1, "a"],
    {"a": 1},
    {"peft_type": 3},
    "FAKE",
    ["x", "x"],
)


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [here, *(place for key, value in items for place in places(value, (*here, key)))]


@given(st.lists(st.tuples(st.sampled_from(places(GOOD)[1:]), st.sampled_from(ODD)), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_change_of_a_good_spec_is_a_spec_or_diagnostics_with_lines(
    changes: list[tuple[tuple[Any, ...], Any]],
) -> None:
    data = copy.deepcopy(GOOD)
    for place, value in changes:
        with suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            holder = data
            for part in place[:-1]:
                holder = holder[part]
            holder[place[-1]] = copy.deepcopy(value)
    reading = read_spec(parse_yaml(json.dumps(data, indent=1), "f"), registry())
    assert (reading.spec is None) == any(d.severity == "error" for d in reading.diagnostics)
    assert all(d.where.line and d.where.path and d.fix for d in reading.diagnostics), reading.diagnostics


def test_the_good_spec_is_good() -> None:
    assert read_spec(parse_yaml(json.dumps(GOOD), "f"), registry()).diagnostics == ()
