"""What the core says for plugins: the record from little, ranks and groups that do not fit, options with their effect."""

from __future__ import annotations

import pickle
import sys
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import torch

from peftc import plugin as p
from peftc.graph.tensors import FactsByName, TensorFacts
from peftc.registry.record import Fields
from tests.unit.fakes import FakeConfig, FakeTuner, check, record

LINEAR = p.LayerFacts(p.Kind.LINEAR, "Linear", 6, 4, params=(("weight", TensorFacts((4, 6), "float32")),))
GROUPED = p.LayerFacts(p.Kind.CONV2D, "Conv2d", 6, 8, kernel=(2, 3), groups=2)


def made(**options: Any) -> p.TunerMethod:
    """The record that `method` makes of the fake method."""
    return p.method(FakeConfig, FakeTuner(), prefix="fake_", layer_names=("fake_v",), **options)()


# facts ----------------------------------------------------------------------------------------------------------------


def test_tensors_of_a_layer_are_a_mapping_that_can_be_a_key() -> None:
    weight, bias = TensorFacts((4, 6), "float32"), TensorFacts((4,), "float32")
    facts = FactsByName({"weight": weight, "bias": bias})
    assert ("bias" in facts, facts["weight"], list(facts.items())) == (
        True,
        weight,
        [("weight", weight), ("bias", bias)],
    )
    same = FactsByName((("weight", weight), ("bias", bias)))
    assert (facts, hash(facts)) == (same, hash(same))
    assert pickle.loads(pickle.dumps(facts)) == facts
    assert facts != FactsByName({"bias": bias, "weight": weight}), "their order is a fact"
    with pytest.raises(TypeError):
        facts["weight"] = bias  # type: ignore[index]


def test_facts_take_pairs_as_they_always_did() -> None:
    assert isinstance(LINEAR.params, FactsByName) and not LINEAR.has_bias
    assert p.LayerFacts(p.Kind.LINEAR, "Linear", 6, 4, params=FactsByName(LINEAR.params)) == LINEAR


def test_what_mathematics_asks_of_a_layer_is_there() -> None:
    assert (LINEAR.fan_in, LINEAR.rank, LINEAR.ones) == (6, 4, ())
    assert (GROUPED.fan_in, GROUPED.rank, GROUPED.ones) == (18, 8, (1, 1))


# the record -----------------------------------------------------------------------------------------------------------


def test_the_short_spelling_has_every_field() -> None:
    assert Fields.__annotations__.keys() == {f.name for f in fields(p.TunerMethod)} - {"peft_type", "config", "tuner"}


def test_the_short_spelling_makes_the_same_record() -> None:
    long, short = record(), made(check=check)
    assert short.peft_type == long.peft_type == "FAKE"
    told = {f.name for f in fields(long) if getattr(long, f.name) != getattr(short, f.name)}
    assert told == {"tuner", "summary"}, "one is another object, and the other was given"


def test_names_stand_for_themselves() -> None:
    def helper() -> None: ...

    short = made(layer_options=("r", "mode"), exports=(helper, FakeTuner), model_methods=(helper,))
    assert short.layer_options == {"r": "r", "mode": "mode"}
    assert short.exports == {"helper": helper, "FakeTuner": FakeTuner}
    assert short.model_methods == {"helper": helper}


@pytest.mark.parametrize(
    ("docstring", "summary", "paper"),
    [
        ("Name: what it does (Who, arXiv:1234.56789, section 3).\n\nMore.", "What it does.", "arXiv:1234.56789"),
        ("Name: what it does. Then more.", "What it does.", ""),
        ("A Name: what it\ndoes (https://example.org/paper).", "What it does.", "https://example.org/paper"),
        ("Options of a method.", "", ""),
        ("`x: y` is what it does", "", ""),
        (None, "", ""),
    ],
)
def test_what_a_method_does_is_the_first_sentence_of_its_module(
    docstring: str | None, summary: str, paper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, FakeConfig.__module__, ModuleType("fakes", docstring))
    assert (made().summary, made().paper) == (summary, paper)
    assert made(summary="Given.", paper="p").summary == "Given."


def test_or_that_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    package, name = FakeConfig.__module__.rpartition(".")[::2]
    monkeypatch.setitem(sys.modules, package, ModuleType(package, "Name: what it does."))
    monkeypatch.setitem(sys.modules, f"{package}.{name}", ModuleType(name, "Options of a method."))
    assert made().summary == "What it does."


def test_default_targets_are_the_table_of_the_types_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made().default_targets == {}
    monkeypatch.setattr("peftc.registry.record.has_table", lambda table: table == "fake")
    assert made().default_targets == {"target_modules": "fake"}
    assert made(default_targets={}).default_targets == {}


# what is declared -----------------------------------------------------------------------------------------------------


class RankedConfig(p.InitWeightsMixin, p.RankPatternMixin, p.BiasMixin, p.LayersConfig):
    n: p.Count = 9
    x_dropout: p.Dropout = 0.25


class Ranked(p.MapTuner[RankedConfig]):
    supports = p.LINEAR_KINDS | p.CONV_KINDS
    rank_limit = p.RankLimit()
    dropout_option = "x_dropout"

    def slots(self, c: RankedConfig, layer: p.LayerFacts) -> p.Slots:
        return ()

    def init(self, c: RankedConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None: ...


class Strict(Ranked):
    rank_limit = p.RankLimit("n", most=lambda layer: layer.fan_in, is_hard=True)
    takes_groups = False


def told(tuner: p.MapTuner[Any], layer: p.LayerFacts, **options: Any) -> list[p.Diagnostic]:
    return list(tuner.problems(RankedConfig(**options), layer, "a.b"))


def test_a_rank_beyond_the_layer_is_warned_of() -> None:
    (problem,) = told(Ranked(), LINEAR, r=5)
    assert (problem.code, problem.severity) == (p.rules.RANK_BEYOND_LAYER.code, p.Severity.WARNING)
    assert "`r: 5`" in problem.what and "`a.b`" in problem.what and "(4)" in problem.what
    assert problem.fix == "Set `r`, or `rank_pattern` for it, to at most 4."
    assert not told(Ranked(), LINEAR, r=4)


def test_what_cannot_be_is_an_error() -> None:
    assert [problem.severity for problem in told(Strict(), LINEAR, n=7)] == [p.Severity.ERROR]
    assert not told(Strict(), LINEAR, n=6, r=99)


def test_groups_are_refused_where_the_mathematics_is_not_of_them() -> None:
    assert not told(Ranked(), GROUPED, r=2)
    assert [problem.code for problem in told(Strict(), GROUPED, n=2)] == [p.rules.BAD_TARGET.code]


def test_the_option_that_drops_is_named_once() -> None:
    made = p.TunerMethod("X", RankedConfig, Ranked(), prefix="x_")
    assert (made.layer_dropout, Ranked().dropout(RankedConfig(x_dropout=0.5))) == ("x_dropout", 0.5)


def test_whether_a_fresh_adapter_has_an_effect_is_what_its_option_says() -> None:
    made = p.TunerMethod("X", RankedConfig, Ranked(), prefix="x_")
    assert made.identity_at_start(RankedConfig()) and not made.identity_at_start(RankedConfig(init_weights=False))
    assert record().identity_at_start(FakeConfig())


# arithmetic -----------------------------------------------------------------------------------------------------------


def test_sums_are_weighted_and_halves_widened() -> None:
    one = torch.ones(2)
    torch.testing.assert_close(p.weighted_sum([one, 2 * one, 3 * one], [1.0, 0.5, -1.0]), -one)
    assert p.widened(one.half()).dtype is torch.float32
    assert p.widened(one.double()).dtype is torch.float64


@pytest.mark.parametrize("dim", [0, -1])
def test_updates_lose_whole_output_features(dim: int) -> None:
    class A:
        config, training = type("C", (), {"rank_dropout": 0.5, "module_dropout": 0.0}), True

    torch.manual_seed(0)
    dropped = p.drop_outputs(A(), torch.ones(8, 8), dim, rescale=False)
    rows = dropped if dim == 0 else dropped.t()
    assert {tuple(row) for row in rows.tolist()} == {(0.0,) * 8, (1.0,) * 8}
    A.training = False
    assert p.drop_outputs(A(), torch.ones(8, 8), dim).eq(1).all()


def test_types_for_annotations_are_torchs_own() -> None:
    assert p.Tensor is torch.Tensor and p.nn is torch.nn
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = p.Nonsense
    assert "Tensor" not in p.__all__, "a star would import torch"
