"""Every installed method that the record has options for, on every base: it trains as on plain layers of the opened weights, and where
it merges, unmerging gives the same bits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc import PeftcError, rules
from peftc.registry.manager import default_registry
from tests.bases.made import BASES, Base
from tests.bases.reference import logits, record, three_steps
from tests.bases.test_storages import adapted, exact, made, opened

OPTIONS = {name: options for name, options in record()["options"].items() if name in default_registry().names}
#: What says that an adapter, or a layer, does not merge.
UNMERGEABLE = {rules.CANNOT_MERGE.code, rules.PACKED_FOR_GOOD.code}


def given(peft_type: str) -> dict[str, Any]:
    """What a call needs beside ids."""
    return {"task_ids": torch.zeros(2, dtype=torch.long)} if "n_tasks" in OPTIONS[peft_type] else {}


@pytest.mark.filterwarnings("ignore:.*PC5")
@pytest.mark.parametrize("peft_type", OPTIONS)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_it_does_what_it_does_on_plain_layers(base: Base, peft_type: str, tmp_path: Path) -> None:
    model = adapted(made(base, tmp_path / "own"), peft_type, **copy.deepcopy(OPTIONS[peft_type]))
    more = given(peft_type)
    y = logits(model, **more)
    try:
        model.merge_adapter()
    except PeftcError as error:
        assert {told.code for told in error.diagnostics} <= UNMERGEABLE
    else:
        model.unmerge_adapter()
    assert torch.equal(logits(model, **more), y)
    if base.passes:
        plain = opened(made(base, tmp_path / "twin"), base.dtype)
        plain._forward_pre_hooks.clear()  # of a library that would open the layers, which are open
        twin = adapted(plain, peft_type, **copy.deepcopy(OPTIONS[peft_type]))
        assert three_steps(model, **more) == pytest.approx(three_steps(twin, **more), abs=2e-4 if exact(base) else 3e-2)
