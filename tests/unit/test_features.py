"""The feature matrix, computed from records."""

from __future__ import annotations

import json

import pytest

from peftc.cli.main import main
from peftc.graph.nodes import LINEAR_KINDS
from peftc.registry.manager import default_registry
from peftc.tuner.features import MATRIX, features_of
from tests.unit import fakes

NAMES = default_registry().names


def test_a_record_s_row() -> None:
    row = features_of(fakes.record())
    assert {name for name, has in row["layers"].items() if has} == set(LINEAR_KINDS)
    assert {name for name, has in row["uses"].items() if not has} == {"combine"}
    assert {name for name, has in row["options"].items() if has} == {"exclude"}


def test_a_function_that_chooses_has_the_kinds_of_its_choices() -> None:
    tuner = fakes.FakeTuner()
    assert not features_of(fakes.record(tuner=lambda c, node: tuner))["layers"]["linear"]
    assert features_of(fakes.record(tuner=lambda c, node: tuner, choices=(tuner,)))["layers"]["linear"]


def test_every_bundled_method_on_layers_says_which() -> None:
    methods = [default_registry().get(name) for name in NAMES]
    assert [m.peft_type for m in methods if m.adapts_layers and not m.supports] == []


def test_the_matrix_is_printed_and_has_a_row_for_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--matrix"]) == 0
    shown = capsys.readouterr().out
    for group in MATRIX:
        assert group.upper() in shown
    assert all(shown.count(name) >= len(MATRIX) for name in NAMES)
    assert main(["methods", "--matrix", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["methods"] == {name: features_of(default_registry().get(name)) for name in NAMES}
    assert main(["methods", NAMES[0].lower(), "--matrix", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == [NAMES[0]]
