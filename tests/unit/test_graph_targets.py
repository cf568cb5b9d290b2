"""Default targets are the reference's, table by table."""

from __future__ import annotations

import re
from typing import Any

import pytest
from peft.utils import constants

from peftc.diagnostics import PeftcError
from peftc.graph.targets import default_targets, known_model_types

_NAME = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+?)(?:_TARGET)?_MODULES_MAPPING")
REFERENCE: dict[str, dict[str, Any]] = {
    match[1].lower(): table
    for name, table in vars(constants).items()
    if (match := _NAME.fullmatch(name)) and isinstance(table, dict)
}


def test_the_reference_was_found() -> None:
    assert len(REFERENCE) > 30


@pytest.mark.parametrize("table", REFERENCE)
def test_a_table_is_the_references(table: str) -> None:
    expected = REFERENCE[table]
    assert set(known_model_types(table)) == set(expected)
    assert {kind: default_targets(table, kind) for kind in expected} == expected


def test_an_unknown_model_type_has_no_default() -> None:
    table = next(iter(REFERENCE))
    assert default_targets(table, "no such model") is None
    assert default_targets(table, None) is None


def test_a_result_can_be_changed_without_harm() -> None:
    table, kind = next((t, k) for t, kinds in REFERENCE.items() for k, v in kinds.items() if isinstance(v, list) and v)
    first = default_targets(table, kind)
    assert isinstance(first, list)
    first.clear()
    assert default_targets(table, kind) == REFERENCE[table][kind]


def test_an_unknown_table_names_the_nearest() -> None:
    table = max(REFERENCE, key=len)
    with pytest.raises(PeftcError, match=table):
        default_targets(f"{table}x", "llama")
