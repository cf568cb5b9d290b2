"""What DoRA costs in training beside a plain low-rank update."""

from __future__ import annotations

import copy

from benchmarks.measure import paired
from benchmarks.models import frozen_llama, training_step, with_lora
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target

STEPS = 7

ROW = Row(
    title="Training step with DoRA",
    how="The model of the training step, rank 8 on all 56 linear layers. A copy with LoRA and one with DoRA step in turn, "
    f"{STEPS} times, in CPU time; each side by itself, so that either's DoRA stands beside its own LoRA.",
    sides=BOTH,
    checks=(
        Check("DoRA step by our LoRA step", Reading(OURS, "adapted"), Reading(OURS, "base"), Target(1.3)),
        Check("the same of the reference", Reading(PEER, "adapted"), Reading(PEER, "base")),
        Check("our DoRA step by the reference's", Reading(OURS, "adapted"), Reading(PEER, "adapted")),
    ),
)


def measure(name: str) -> Readings:
    """Seconds of a step with LoRA (`base`) and with DoRA (`adapted`)."""
    base = frozen_llama()
    plain = with_lora(name, copy.deepcopy(base))
    rescaled = with_lora(name, base, use_dora=True)
    return paired(training_step(plain), training_step(rescaled), calls=STEPS, warm_up=1)


if __name__ == "__main__":
    run(measure)
