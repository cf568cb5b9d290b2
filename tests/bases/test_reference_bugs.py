"""What the reference does wrong on packed bases, as `docs/reference-bugs.md` says: so that the page stays true."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bases.made import BASES, IDS
from tests.bases.reference import TARGETS, adapted, of_reference, record

PEFT_TYPE = next(iter(record()["options"]))


@pytest.mark.parametrize("name", ["quanto int8", "quanto int4", "quanto float8"])
def test_merging_into_quanto_loses_the_adapter(name: str) -> None:
    if reason := BASES[name].missing():
        pytest.skip(reason)
    told = of_reference(name, PEFT_TYPE)
    assert told.merged == pytest.approx(told.effect) and told.effect > 0.05


def test_adapters_before_a_layer_without_a_derivative_learn_nothing(tmp_path: Path) -> None:
    base = BASES["torchao int8 dynamic"]
    if reason := base.missing():
        pytest.skip(reason)
    model = adapted(base, PEFT_TYPE, {"target_modules": TARGETS}, tmp_path).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert learning and all("down_proj" in name for name in learning)
