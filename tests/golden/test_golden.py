"""Every golden case is reproduced.

Case folders are found, not named: a method adds its own.
"""

from __future__ import annotations

import json

import pytest

from peftc.registry.manager import default_registry, installed
from peftc.testing.golden import GoldenCase, golden_cases
from tests.golden.models import DATA, base_model

CASES = golden_cases(DATA)
COMPLETE = [case for case in CASES if case.is_complete]


@pytest.mark.parametrize("case", COMPLETE, ids=str)
def test_a_case_is_reproduced(case: GoldenCase) -> None:
    case.check(base_model(case.info["model"]))


def test_every_case_has_all_its_files() -> None:
    assert CASES == COMPLETE


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
