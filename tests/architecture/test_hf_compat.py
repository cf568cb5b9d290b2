"""`docs/hf-compat.md` says what is so: the comparison notices every kind of difference, and gives a reason for each."""

from __future__ import annotations

import inspect
import sys

import pytest

from peftc.registry.manager import default_registry
from tests.architecture.tree import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import hf_compat  # the page's own code, beside it

ROWS = list(hf_compat.all_rows(default_registry()))


def test_at_least_95_percent_are_the_same() -> None:
    here = [row for row in ROWS if row.status != hf_compat.TO_COME]
    assert sum(row.status == hf_compat.SAME for row in here) >= 0.95 * len(here)


def test_every_other_row_has_a_reason() -> None:
    assert [str(row) for row in ROWS if row.status != hf_compat.SAME and not row.why] == []


def test_every_name_has_one_row() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) > 2000


@pytest.mark.parametrize(
    ("theirs", "ours", "difference"),
    [
        ("(self, a, b=1)", "(self, a, b=1)", ""),
        ("(self, a, b=1)", "(self, a, b=1, c=2)", ""),
        ("(self, a, b=1)", "(self, *args, **kwargs)", ""),
        ("(a, *, b='x')", "(a, b='x')", ""),
        ("(a, b=1)", "(b=1, a=2)", "`a` is at another place"),
        ("(a, b=1)", "(a, b=2)", "`b` is 2 by default, there 1"),
        ("(a, b=1)", "(a, b)", "`b` must be given"),
        ("(a, b=1)", "(a)", "does not take `b`"),
        ("(a, **kwargs)", "(a)", "takes no further keywords"),
        ("(a, *args)", "(a, **kwargs)", "takes no further arguments"),
        ("(a)", "(a, b)", "needs `b`"),
    ],
)
def test_a_difference_of_signatures_is_found(theirs: str, ours: str, difference: str) -> None:
    names: dict[str, object] = {}
    exec(f"def f{ours}: ...", names)
    assert hf_compat._mismatch(hf_compat._parameters(theirs), inspect.signature(names["f"])) == difference  # type: ignore[arg-type]
