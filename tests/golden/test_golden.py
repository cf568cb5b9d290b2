"""Every golden case is reproduced, or stands on its method's list of what this version refuses, and is refused.

Case folders are found, not named: a method adds its own.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.model.mapping import get_peft_model
from peftc.registry.manager import default_registry, installed
from peftc.testing.golden import GoldenCase, golden_cases
from tests.golden.models import DATA, base_model

CASES = golden_cases(DATA)
COMPLETE = [case for case in CASES if case.is_complete]


def left_out() -> dict[str, dict[str, Any]]:
    """Refused cases of all methods by name."""
    lists = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in DATA.glob("*/left_out.json")}
    return {f"{method}-{name}": entry for method, entries in lists.items() for name, entry in entries.items()}


LEFT_OUT = left_out()


@pytest.mark.parametrize("case", COMPLETE, ids=str)
def test_a_case_is_reproduced(case: GoldenCase) -> None:
    case.check(base_model(case.info["model"]))


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in LEFT_OUT], ids=str)
def test_a_case_that_is_left_out_is_refused_as_the_list_says(case: GoldenCase) -> None:
    with pytest.raises(PeftcError) as caught:
        get_peft_model(base_model(case.info["model"]), PeftConfig.from_pretrained(case.folder))
    codes = {diagnostic.code for diagnostic in caught.value.diagnostics}
    assert codes == {LEFT_OUT[str(case)]["code"]}, LEFT_OUT[str(case)]["reason"]


def test_every_case_is_run_or_left_out() -> None:
    assert {str(case) for case in CASES if not case.is_complete} == set(LEFT_OUT)


def test_every_bundled_method_has_cases() -> None:
    bundled = {claim.peft_type for claim in installed() if claim.distribution == "peftc"}
    bundled -= {
        name for name in bundled if default_registry().get(name).call_tuner is not None
    }  # a case is one adapter
    assert bundled - {case.folder.parent.name for case in COMPLETE} == set()


def test_every_case_belongs_to_a_method_and_says_so() -> None:
    for case in CASES:
        config = json.loads((case.folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["peft_type"] == case.folder.parent.name in default_registry().names
