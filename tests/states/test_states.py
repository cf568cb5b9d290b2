"""Any order of operations leaves a model that computes, trains, tells and saves what it should: `tests/states/machine.py`.

At least 10,000 steps over all worlds, counted below; they are the same ones until the code of the machine changes, and take
some two minutes on one core. A million others: `python -m tests.states 1000000`.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.states.machine import Machine, machine, played
from tests.states.worlds import worlds

#: in all worlds together
STEPS = 10_000
#: operations on one model
LENGTH = 25
#: models beyond those that would do if each had all its operations: some end earlier
MORE = 6


@pytest.mark.parametrize("world", worlds())
def test_operations_in_any_order(world: str) -> None:
    before, found = Machine.steps, machine(worlds()[world])
    chosen = settings(played(STEPS // len(worlds()) // LENGTH + MORE, LENGTH), derandomize=True)
    run_state_machine_as_test(found, settings=chosen)
    assert Machine.steps - before >= STEPS / len(worlds())
