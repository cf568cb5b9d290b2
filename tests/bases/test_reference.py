"""The reference asked live agrees with its record, and its adapters load into a model of ours that trains alike."""

from __future__ import annotations

import pytest

import peftc
from tests.bases.made import BASES, Base, loaded
from tests.bases.reference import FLOAT, losses_of_reference, of_reference, record, three_steps

FIRST_TYPE = next(iter(record()["options"]))


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_first_type_trains_where_the_record_says(base: Base) -> None:
    if base.missing():
        pytest.skip(base.missing())
    told = of_reference(base, FIRST_TYPE)
    assert bool(told.losses) == (FIRST_TYPE in record()["found"][base.name])
    if not told.losses:
        with pytest.raises(RuntimeError):
            losses_of_reference(base, FIRST_TYPE)
    else:
        assert losses_of_reference(base, FIRST_TYPE) == told.losses and told.losses[2] < told.losses[0]


def test_an_adapter_of_the_reference_trains_in_ours_from_the_same_start() -> None:
    told = of_reference(FLOAT, FIRST_TYPE)
    assert told.adapter is not None and told.apart == 0
    model = peftc.PeftModel.from_pretrained(loaded(), told.adapter, is_trainable=True)
    assert three_steps(model) == pytest.approx(told.losses, abs=1e-6)
