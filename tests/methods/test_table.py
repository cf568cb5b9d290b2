"""The table of variants and starts with a stranger's variant in it, which comes under every check of its method."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from peftc import plugin as p
from peftc.registry.manager import default_registry
from peftc.testing import examine
from peftc.testing.cells import all_rows
from peftc.testing.kit import chosen
from tests.methods import gated

CHECK = "begins_as_it_says"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The variant does not stay known."""
    yield
    default_registry().variants.forget("lora.gated")


def test_it_comes_under_every_check() -> None:
    """Its mathematics under those of methods, its rows of the table beside; where it is chosen, a swap goes on with it."""
    names = {case.check for case in chosen(gated)}
    assert {CHECK, "merged_equals_unmerged", "saving_and_loading_is_exact", "plan_equals_model"} <= names
    report = examine(gated, CHECK, "swapping_exchanges_values", "acts_when_trained", "plan_equals_model")
    assert report.peft_type == "lora.gated"
    assert not report.findings, str(report)
    assert report.ran > 20


def test_one_that_claims_more_kinds_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated.Gated, "supports", p.LINEAR_KINDS | p.CONV_KINDS)
    assert "On the kind `conv1d`" in str(examine(gated, CHECK))


def test_the_tables_of_its_method_have_its_rows() -> None:
    method = default_registry().get("LORA")
    before = len(all_rows(method))
    p.register_variant(gated)
    rows = [row for row in all_rows(method) if row.variant is not None and row.variant.name == "gated"]
    assert len(all_rows(method)) - before == len(rows) > 0
    assert all(row.options["variant"] == "gated" for row in rows)
