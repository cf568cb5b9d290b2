"""Config objects behave as people expect of the reference's, for every registered method; the reference is the oracle."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import pprint
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import HfArgumentParser

import peftc
from peftc import rules
from peftc.config.base import CONFIG_NAME, PeftConfig, PeftConfigMixin
from peftc.config.docs import describe, descriptions
from peftc.config.files import config_from_dict
from peftc.config.mixins import TargetsMixin
from peftc.config.types import PeftType, TaskType
from peftc.diagnostics import ConfigError, PeftcWarning, Severity
from peftc.registry.manager import Registry, default_registry
from peftc.tuner.method import TunerMethod
from tests.unit.fakes import FakeConfig, Inner, plugin

REGISTRY = default_registry()
METHODS = [REGISTRY.get(name) for name in REGISTRY.names]
#: a width that no default is
DIMS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 12}


def completed(method: TunerMethod, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with those that have no usable default: the reference raises or makes values up where they are missing.

    What the method itself misses is taken from its first example; adapters to weigh, and what is found out of a model, are
    filled in.
    """
    whole = {**options, **method.needed(options)}
    for problem in method.check(method.config(**whole)):
        missed = problem.where.path or ""
        if problem.severity is Severity.ERROR and missed not in whole:
            whole[missed] = method.examples[0][missed]
    if method.call_tuner is not None:
        whole.setdefault(method.call_tuner.option, {"one": "some/adapter", "other": "folder"})
        whole |= method.call_tuner.resolve(method.config(**whole), DIMS)
    return whole


#: whose options may all be left out
FREE = next(method for method in METHODS if not method.needed({}))

EXAMPLES = [(m, completed(m, example)) for m in METHODS for example in ({}, *m.examples)]
#: the least that a config of each method takes in the reference as well
LEAST = {m.peft_type: options for m, options in reversed(EXAMPLES)}

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.peft_type)
each_example = pytest.mark.parametrize(("method", "options"), EXAMPLES, ids=lambda v: getattr(v, "peft_type", None))


def reference(method: TunerMethod) -> Any:
    """The reference's class of the same public name."""
    return getattr(peft, method.config.__name__)


def theirs_of(method: TunerMethod, options: Mapping[str, Any]) -> Any:
    """The reference's config; a task that follows from the method is said, which the reference asks for."""
    task = method.config(**options).task_type
    return reference(method)(**{**({} if task is None else {"task_type": task.value}), **options})


def filled(method: TunerMethod) -> PeftConfig:
    """A config with something in the options that can be changed in place."""
    options = dict(method.examples[0]) if method.examples else {}
    if issubclass(method.config, TargetsMixin):
        options["target_modules"] = ["b", "a"]
    return method.config(task_type="CAUSAL_LM", **options)


# beside the reference ------------------------------------------------------------------------------------------------


@each_example
def test_options_and_defaults_are_the_references(method: TunerMethod, options: dict[str, Any]) -> None:
    ours, theirs = method.config(**options).to_dict(), theirs_of(method, options).to_dict()
    del ours["peft_version"], theirs["peft_version"]  # it writes its own
    assert theirs == ours


@pytest.mark.parametrize("method", [m for m in METHODS if LEAST[m.peft_type]], ids=lambda m: m.peft_type)
def test_options_that_must_be_given_are_empty_in_both_until_then(method: TunerMethod) -> None:
    fields, ours = {field.name: field for field in dataclasses.fields(reference(method))}, method.config.model_fields
    for name in LEAST[method.peft_type]:
        made = fields[name].default_factory
        empty = ours[name].get_default(call_default_factory=True)
        assert empty == (fields[name].default if made is dataclasses.MISSING else made())


@each_example
def test_the_file_is_the_references(method: TunerMethod, options: dict[str, Any], tmp_path: Path) -> None:
    if issubclass(method.config, TargetsMixin):
        options = {**options, "target_modules": ["b", "a"]}
    files = []
    for name, config in (("ours", method.config(**options)), ("theirs", theirs_of(method, options))):
        config.save_pretrained(tmp_path / name)
        text = (tmp_path / name / CONFIG_NAME).read_text()
        data = json.loads(text)
        assert text == json.dumps(data, indent=2, sort_keys=True)
        del data["peft_version"]
        files.append({k: sorted(v) if k == "target_modules" and v else v for k, v in data.items()})
    assert files[1] == files[0]


@each_example
def test_each_reads_the_others_file(method: TunerMethod, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = theirs_of(method, options)
    theirs.save_pretrained(tmp_path / "theirs")
    read = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert {**read.to_dict(), "peft_version": None} == {**method.config(**options).to_dict(), "peft_version": None}
    method.config(**options).save_pretrained(tmp_path / "ours")
    assert {**peft.PeftConfig.from_pretrained(tmp_path / "ours").to_dict(), "peft_version": None} == {
        **theirs.to_dict(),
        "peft_version": None,
    }


@each_method
def test_an_unknown_keyword_raises_what_the_reference_raises(method: TunerMethod) -> None:
    for cls in (method.config, reference(method)):
        with pytest.raises(TypeError, match="no_such_option"):
            cls(no_such_option=1)


@each_method
def test_attributes_of_the_class(method: TunerMethod) -> None:
    least = LEAST[method.peft_type]
    for ours, theirs in ((method.config(**least), theirs_of(method, least)),):
        assert ours.peft_type.value == theirs.peft_type.value == method.peft_type
        assert ours.is_prompt_learning == theirs.is_prompt_learning
        assert ours.is_adaption_prompt == theirs.is_adaption_prompt


@each_example
def test_dataclasses_take_it_for_one_as_the_references(method: TunerMethod, options: dict[str, Any]) -> None:
    ours, theirs = method.config(**options), theirs_of(method, options)
    assert dataclasses.is_dataclass(ours) and dataclasses.is_dataclass(method.config)
    fields, known = ({field.name: field for field in dataclasses.fields(config)} for config in (ours, theirs))
    assert known.keys() <= fields.keys()
    assert all(field.metadata["help"] and field.init for field in fields.values())
    made, wanted = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    assert {name: made[name] for name in wanted if name != "peft_version"} == {
        name: value for name, value in wanted.items() if name != "peft_version"
    }
    other = dataclasses.replace(ours, inference_mode=True)
    assert (type(other), other.inference_mode, ours.inference_mode) == (type(ours), True, False)
    assert other.__replace__(inference_mode=False) == ours  # what `copy.replace` calls, from Python 3.13 on
    with pytest.raises(TypeError, match="no_such_option"):
        dataclasses.replace(ours, no_such_option=1)
    with pytest.raises(ValueError, match="inference_mode"):
        dataclasses.replace(ours, inference_mode="perhaps")
    pprint.pformat(ours)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.peft_type)
def test_a_parser_of_dataclasses_takes_what_it_takes_of_the_references(method: TunerMethod) -> None:
    def parsed(cls: type) -> bool:
        try:
            HfArgumentParser(cls)
        except (TypeError, ValueError):
            return False
        return True

    assert parsed(method.config) or not parsed(reference(method))


@each_method
def test_a_config_knows_which_version_made_it(method: TunerMethod) -> None:
    least = LEAST[method.peft_type]
    ours, theirs = method.config(**least), theirs_of(method, least)
    for version, known in (
        (ours.peft_version, theirs.peft_version),
        (ours.to_dict()["peft_version"], peft.__version__),
    ):
        assert str(version).partition("@")[0] == known


# as an object --------------------------------------------------------------------------------------------------------


@each_method
def test_a_config_is_made_again_from_its_dict(method: TunerMethod) -> None:
    config = filled(method)
    assert type(config)(**config.to_dict()) == config
    assert type(config)(**config.to_json()) == config


@each_method
def test_copies_pickles_and_equality(method: TunerMethod) -> None:
    config = filled(method)
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.revalidated()):
        assert other == config
        assert type(other) is type(config)
        other.inference_mode = True
        assert other != config


@each_method
def test_a_deep_copy_shares_nothing(method: TunerMethod) -> None:
    config = filled(method)
    other = copy.deepcopy(config)
    for name in type(config).model_fields:
        value = getattr(config, name)
        assert not isinstance(value, (list, dict, set)) or getattr(other, name) is not value


@each_method
def test_saving_and_reading_keeps_everything(method: TunerMethod, tmp_path: Path) -> None:
    config = filled(method)
    config.save_pretrained(str(tmp_path / "new" / "folder"), safe_serialization=True)
    assert method.config.from_pretrained(str(tmp_path / "new" / "folder"), is_trainable=True, foo=1) == config


@each_method
def test_a_config_cannot_be_of_another_type(method: TunerMethod) -> None:
    with pytest.raises(ConfigError, match="has no other type"):
        method.config(peft_type="SOMETHING")
    assert method.least(peft_type=None).peft_type == method.peft_type


@each_method
def test_a_config_is_found_by_its_public_name(method: TunerMethod) -> None:
    assert getattr(peftc, method.config.__name__) is method.config


def test_attributes_can_be_changed_in_place() -> None:
    config = FakeConfig(target_modules=["a"])
    assert isinstance(config.target_modules, set)
    config.target_modules.add("b")
    config.pattern["x"] = 3
    config.r = 4
    assert config.to_json()["target_modules"] == ["a", "b"]
    assert (config.to_dict()["pattern"], config.to_dict()["r"]) == ({"x": 3}, 4)


def test_a_caller_keeps_its_own_list() -> None:
    names, pattern = ["a"], {"x": 1}
    config = FakeConfig(target_modules=names, pattern=pattern)
    assert isinstance(config.target_modules, set)
    config.target_modules.add("b")
    assert (names, FakeConfig().pattern is FakeConfig().pattern) == (["a"], False)


@pytest.mark.parametrize("names", [["a", "b"], ("a", "b"), {"a", "b"}, frozenset("ab")])
def test_names_come_in_any_collection(names: Any) -> None:
    assert FakeConfig(target_modules=names).target_modules == {"a", "b"}


@pytest.mark.parametrize("task", ["CAUSAL_LM", TaskType.CAUSAL_LM, peft.TaskType.CAUSAL_LM])
def test_a_task_is_text_or_member(task: Any) -> None:
    config = FakeConfig(task_type=task)
    assert config.task_type is TaskType.CAUSAL_LM
    assert config.to_json()["task_type"] == "CAUSAL_LM"


def test_a_type_is_a_string_with_the_looks_of_a_member() -> None:
    kind = PeftType("X")
    assert (kind.value, kind.name, str(kind), kind == "X", hash(kind) == hash("X")) == ("X", "X", "X", True, True)
    assert pickle.loads(pickle.dumps(kind)) == kind


def test_all_problems_of_a_config_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        FakeConfig(r=0, rte=1, mode="three", inner={"dept": 1, "depth": 0}, target_modules=[1])
    assert {(d.code, d.where.path) for d in caught.value.diagnostics} == {
        (rules.BAD_VALUE.code, "r"),
        (rules.UNKNOWN_KEY.code, "rte"),
        (rules.BAD_VALUE.code, "mode"),
        (rules.UNKNOWN_KEY.code, "inner.dept"),
        (rules.BAD_VALUE.code, "inner.depth"),
        (rules.BAD_VALUE.code, "target_modules[0]"),
    }
    assert "Did you mean `rate`" in str(caught.value)
    assert "How deep." in str(caught.value)


def test_an_unknown_attribute_is_an_error_that_names_the_nearest() -> None:
    config = FakeConfig()
    with pytest.raises(TypeError, match="Did you mean `rate`"):
        config.rte = 1  # type: ignore[attr-defined]


def test_a_value_assigned_wrongly_is_found_when_it_is_used(tmp_path: Path) -> None:
    config = FakeConfig()
    config.r = 0
    with pytest.raises(ConfigError, match="`r` cannot be `0`"):
        config.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_for_python_only_is_in_no_file(tmp_path: Path) -> None:
    config = FakeConfig(runtime=object())
    config.save_pretrained(tmp_path)
    assert "runtime" not in json.loads((tmp_path / CONFIG_NAME).read_text())


# what options mean ---------------------------------------------------------------------------------------------------


@each_method
def test_every_option_is_explained(method: TunerMethod) -> None:
    assert [name for name in method.config.model_fields if not describe(method.config, name)] == []


def test_meanings_are_the_docstrings_of_the_class_and_its_bases() -> None:
    assert describe(FakeConfig, "mode") == "One of two."
    assert "regular expression" in describe(FakeConfig, "target_modules")
    assert descriptions(Inner) == {"depth": "How deep."}


def test_a_class_without_source_has_no_meanings() -> None:
    space: dict[str, Any] = {"Inner": Inner}
    exec("class Made(Inner):\n    x: int = 1\n    'text'", space)
    assert descriptions(space["Made"]) == {"depth": "How deep."}


# what users of the reference's class do with a config -----------------------------------------------------------------


@each_example
def test_what_a_dictionary_holds_makes_the_config_again(method: TunerMethod, options: dict[str, Any]) -> None:
    config = method.config(**options)
    assert method.config(**config.to_dict()) == config
    assert method.config(**json.loads(json.dumps(config.to_json()))) == config
    assert PeftConfig.from_peft_type(**config.to_dict()) == config
    assert method.config.from_peft_type(**options) == config


@each_example
def test_copies_are_equal_and_apart(method: TunerMethod, options: dict[str, Any]) -> None:
    config = method.config(**options)
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and same is not config
        same.inference_mode = True
        assert same != config and not config.inference_mode
    assert config != PeftConfig(peft_type=method.peft_type)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.peft_type)
def test_an_unknown_keyword_is_a_type_error_as_in_the_reference(method: TunerMethod) -> None:
    for cls in (method.config, reference(method)):
        with pytest.raises(TypeError):
            cls(no_such_option=1)
    config, theirs = method.least(), reference(method)(task_type="CAUSAL_LM", **LEAST[method.peft_type])
    assert isinstance(config, PeftConfig) and isinstance(config, PeftConfigMixin)
    assert config.peft_type.value == theirs.peft_type.value == method.peft_type
    assert config.is_adaption_prompt is theirs.is_adaption_prompt
    assert config.is_prompt_learning is theirs.is_prompt_learning


def test_the_type_in_the_file_decides_whatever_class_reads_it(tmp_path: Path) -> None:
    one, other = METHODS[0].config(**LEAST[METHODS[0].peft_type]), METHODS[1].config
    one.save_pretrained(tmp_path / "folder" / "inside", auto_mapping_dict={"base_model_class": "A"})
    read = other.from_pretrained(tmp_path / "folder", "inside", r=77, ephemeral_gpu_offload=True, task_type="CAUSAL_LM")
    assert type(read) is type(one)
    assert read == one.model_copy(update={"auto_mapping": {"base_model_class": "A"}})
    assert str(read.peft_version).startswith("0.21.2@")
    theirs = reference(METHODS[1]).from_pretrained(str(tmp_path / "folder"), "inside", r=77, task_type="CAUSAL_LM")
    assert type(theirs) is reference(METHODS[0])


def test_a_file_as_plain_data_without_what_describes_a_run(tmp_path: Path) -> None:
    METHODS[0].least().save_pretrained(tmp_path)
    file = tmp_path / CONFIG_NAME
    data = json.loads(file.read_text())
    assert PeftConfig.from_json_file(file) == data == peft.PeftConfig.from_json_file(str(file))
    file.write_text(json.dumps({**data, "runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(PeftcWarning, match="PC122"):
        assert PeftConfig.from_json_file(file) == data
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="PC116"):
        PeftConfig.from_json_file(file)


def test_keywords_of_another_version_are_dropped_with_a_warning() -> None:
    with pytest.warns(PeftcWarning, match="later_option"):
        config = PeftConfig.from_peft_type(peft_type=FREE.peft_type, later_option=3)
    assert config == FREE.config()
    with pytest.raises(TypeError):
        PeftConfig.from_peft_type(later_option=3)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_no_file_is_a_value_error_as_in_the_reference(place: str, tmp_path: Path) -> None:
    for cls in (PeftConfig, peft.PeftConfig):
        with pytest.raises(ValueError):
            cls.from_pretrained(str(tmp_path / place))


def test_a_class_may_change_what_a_file_says(tmp_path: Path) -> None:
    class Moved(PeftConfig):
        peft_type: PeftType | None = PeftType("MOVED")
        new_name: int = 0

        @classmethod
        def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
            kwargs["new_name"] = kwargs.pop("old_name", 0)
            return kwargs

    registry = Registry([])
    registry.register(plugin(replace(METHODS[0], peft_type="MOVED", config=Moved)), "moved")
    config, told = config_from_dict({"peft_type": "MOVED", "old_name": 3}, lenient=True, registry=registry)
    assert (config, told) == (Moved(new_name=3), [])
    assert PeftConfig.check_kwargs(a=1) == {"a": 1}


# types as members -----------------------------------------------------------------------------------------------------


def test_types_are_members_of_an_open_enum() -> None:
    for method in METHODS:
        member = getattr(PeftType, method.peft_type)
        assert member == PeftType[method.peft_type] == PeftType(method.peft_type) == method.peft_type
        assert (member.name, member.value, isinstance(member, PeftType)) == (method.peft_type, method.peft_type, True)
        assert member in PeftType and method.peft_type in PeftType
        assert getattr(peft.PeftType, method.peft_type).value == member.value
    assert list(PeftType) == list(PeftType.__members__.values()) == [m.peft_type for m in METHODS]
    assert len(PeftType) == len(METHODS) and "NOTHING" not in PeftType and bool(PeftType)


def test_a_type_that_is_not_installed_is_no_member() -> None:
    name = METHODS[0].peft_type
    with pytest.raises(AttributeError, match=f"Did you mean `{name}`"):
        getattr(PeftType, f"{name[:-1]}X{name[-1]}")
    with pytest.raises(KeyError):
        PeftType["NOTHING"]
    assert not hasattr(PeftType, "__wrapped__") and not hasattr(PeftType, "NOTHING")


def test_tasks_are_the_references() -> None:
    assert {t.name: t.value for t in TaskType} == {t.name: t.value for t in peft.TaskType}


def test_half_a_surrogate_pair_is_told_as_any_wrong_word() -> None:
    with pytest.raises(ConfigError) as caught:
        PeftConfig(task_type="\ud800")
    assert [d.code for d in caught.value.diagnostics] == [rules.BAD_VALUE.code]
    assert "Invalid task type" in str(caught.value).encode("utf-8", "backslashreplace").decode()
