"""The load report names every missing, unexpected and mis-shaped key, for every method, and refuses a load without effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc import rules
from peftc.checkpoint.load import open_adapter
from peftc.checkpoint.names import PLAN_NAME
from peftc.checkpoint.report import LoadReport, base_of, base_tensors, expected_tensors, match, match_file
from peftc.checkpoint.save import save_adapter
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import PeftcError, PeftcWarning, Rule
from peftc.graph.tensors import TensorFacts
from peftc.model.parts.files import live_names
from peftc.tuner.method import TunerMethod
from tests.unit.adapters import adapter_plan, examples, injection_plan, little_graph

EXAMPLES = list(examples())
each_example = pytest.mark.parametrize(("method", "example"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
LAYERED = next(e for e in EXAMPLES if e[1].adapts_layers)


def layered(width: int = 8) -> AdapterPlan:
    """A plan of some method on layers."""
    return adapter_plan(LAYERED[1], LAYERED[2], width=width)


def codes(report: LoadReport) -> list[str]:
    return [diagnostic.code for diagnostic in report.diagnostics]


def only(report: LoadReport, rule: Rule) -> str:
    """The text of the one diagnostic."""
    assert codes(report) == [rule.code]
    return str(report.diagnostics[0])


@each_example
def test_what_the_plan_saves_is_what_it_expects(method: TunerMethod, example: dict[str, Any]) -> None:
    plan = adapter_plan(method, example)
    found = expected_tensors(plan)
    report = match(plan, found)
    assert report.is_clean
    assert report.sources == {key: key for key in found}
    assert report.require() is report
    assert found, "every method saves something"


@each_example
def test_the_report_names_each_key(method: TunerMethod, example: dict[str, Any]) -> None:
    plan = adapter_plan(method, example)
    expected = expected_tensors(plan)
    for key, facts in expected.items():
        other = TensorFacts((*facts.shape[:-1], facts.shape[-1] + 1) if facts.shape else (1,), facts.dtype)
        misfit = match(plan, {**expected, key: other})
        assert [(m.key, m.expected, m.found) for m in misfit.misfits] == [(key, facts.shape, other.shape)]
        assert key not in misfit.sources
        with pytest.raises(PeftcError, match=rules.SHAPES_DIFFER.code) as caught:
            misfit.require()
        assert str(other.shape) in str(caught.value)
        missing = match(plan, {k: v for k, v in expected.items() if k != key})
        assert missing.missing == (key,)
        assert missing.missing_keys == [key]
        if len(expected) > 1:
            assert f"`{key}`" in only(missing, rules.KEYS_MISSING)
    extra = match(plan, {**expected, "base_model.model.elsewhere.weight": TensorFacts((1,), "float32")})
    assert "`base_model.model.elsewhere.weight`" in only(extra, rules.KEYS_UNEXPECTED)
    assert extra.unexpected_keys == ["base_model.model.elsewhere.weight"]
    with pytest.warns(PeftcWarning, match="elsewhere"):
        extra.require()


@each_example
def test_a_load_without_effect_is_an_error(method: TunerMethod, example: dict[str, Any]) -> None:
    plan = adapter_plan(method, example)
    renamed = {f"other.{key}x": facts for key, facts in expected_tensors(plan).items()}
    for found in ({}, renamed):
        report = match(plan, found)
        only(report, rules.NOTHING_LOADS)
        with pytest.raises(PeftcError, match=rules.NOTHING_LOADS.code):
            report.require()


def test_base_tensors_alone_are_no_effect_either() -> None:
    plan = layered()
    found = dict(list(base_tensors(plan).items())[:1])
    assert rules.NOTHING_LOADS.code in codes(match(plan, found))


def test_another_wrapping_of_the_model_is_named() -> None:
    plan = layered()
    moved = {
        f"base_model.model.text.{key.removeprefix('base_model.model.')}": facts
        for key, facts in expected_tensors(plan).items()
    }
    told = only(match(plan, moved), rules.NOTHING_LOADS)
    assert "`base_model.model.text` where this adapter has `base_model.model`" in told


def test_keys_without_the_root_are_found_and_the_report_says_so() -> None:
    plan = layered()
    found = {key.removeprefix(plan.root): facts for key, facts in expected_tensors(plan).items()}
    report = match(plan, found)
    assert report.sources == {key: key.removeprefix(plan.root) for key in expected_tensors(plan)}
    assert "under another name" in only(report, rules.KEYS_RENAMED)


def live(plan: AdapterPlan, name: str) -> dict[str, str]:
    """Checkpoint key -> the name that a wrapped model with the adapter under this name has for it."""
    return live_names(replace(plan, name=name))


@each_example
def test_keys_with_an_adapters_name_in_them_are_found_whatever_the_name(
    method: TunerMethod, example: dict[str, Any]
) -> None:
    plan = adapter_plan(method, example)
    expected = expected_tensors(plan)
    names = live(plan, "weight")  # a name that is a segment of other keys as well
    report = match(plan, {names.get(key, key): facts for key, facts in expected.items()})
    assert report.sources == {key: names.get(key, key) for key in expected}
    assert codes(report) in ([], [rules.KEYS_RENAMED.code])


def test_keys_with_names_of_several_adapters_are_the_adapters_own() -> None:
    plan = layered()
    found = {live(plan, name)[key]: facts for name in ("one", "two") for key, facts in expected_tensors(plan).items()}
    only(match(plan, found), rules.NOTHING_LOADS)
    own = replace(plan, name="two")
    assert match(own, found).sources == live(own, "two")


def test_the_nearest_key_is_named() -> None:
    plan = layered()
    found = dict(expected_tensors(plan))
    key = next(iter(found))
    found[f"base_model.model.extra.{key.removeprefix('base_model.model.')}"] = found.pop(key)
    report = match(plan, found)
    assert codes(report) == [rules.KEYS_MISSING.code, rules.KEYS_UNEXPECTED.code]
    assert f"nearest to `{key}` is `base_model.model.extra." in str(report.diagnostics[0])


def test_base_tensors_in_the_file_are_carried() -> None:
    """The reference saves an adapted vocabulary layer whole, with its adapter."""
    plan = layered()
    key, facts = next(iter(base_tensors(plan).items()))
    report = match(plan, {**expected_tensors(plan), key: facts})
    assert report.is_clean
    assert report.carried == (key,)
    assert report.sources[key] == key
    resized = match(plan, {**expected_tensors(plan), key: TensorFacts((99, *facts.shape[1:]), facts.dtype)})
    only(resized, rules.SHAPES_DIFFER)
    assert resized.carried == ()


def test_buffers_of_modules_that_are_saved_whole_are_expected() -> None:
    plan = layered()
    assert any(save.buffers for save in plan.saves), "the little model has a normalisation with buffers"
    assert "base_model.model.norm.running_mean" in expected_tensors(plan)


def test_another_base_is_named_with_both_models() -> None:
    wide = layered(width=16)
    here, there = little_graph(8).model, little_graph(16).model
    report = match(layered(), expected_tensors(wide), model=here, trained_on=there)
    assert codes(report) == [rules.SHAPES_DIFFER.code, rules.OTHER_BASE.code]
    told = str(report.diagnostics[1])
    assert "`little-16`, not on `little-8`" in told
    assert "hidden_size `16` against `8`" in told
    same = match(layered(), expected_tensors(wide), model=here, trained_on=replace(here, name_or_path="elsewhere"))
    assert codes(same) == [rules.SHAPES_DIFFER.code]


def test_the_plan_beside_the_file_says_what_it_was_trained_on(tmp_path: Path) -> None:
    plan = injection_plan(LAYERED[1], LAYERED[2], width=16)
    adapter = plan.adapters[0]
    tensors = {key: torch.ones(facts.shape) for key, facts in expected_tensors(adapter).items()}
    save_adapter(tmp_path, tensors, adapter.config, plan)
    assert base_of(tmp_path) == plan.model
    file = open_adapter(tmp_path)
    assert match_file(adapter, file, plan.model).is_clean
    report = match_file(layered(), file, little_graph(8).model)
    assert codes(report) == [rules.SHAPES_DIFFER.code, rules.OTHER_BASE.code]
    assert str(file.path) in str(report.diagnostics[0])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": 1}', '{"model": {"x": 1}}', '{"model": {"cls": "A", "dims": 3}}']
)
def test_a_damaged_plan_explains_nothing_and_breaks_nothing(tmp_path: Path, text: str) -> None:
    assert base_of(tmp_path) is None
    (tmp_path / PLAN_NAME).write_text(text)
    assert base_of(tmp_path) is None
    (tmp_path / PLAN_NAME).write_text(json.dumps({"model": {"cls": "A"}}))
    assert base_of(tmp_path) is not None
