"""The cost of an adapter in training: how much longer a step takes than that of the frozen base."""

from __future__ import annotations

import copy

from benchmarks.measure import paired
from benchmarks.models import frozen_llama, training_step, with_lora
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target

STEPS = 7

ROW = Row(
    title="Training step, time",
    how="A Llama of hidden size 512, intermediate size 1,376 and 8 layers in float32, rank 8 on all 56 linear layers, 4 × 256 "
    "tokens. A step is forward, loss, backward and dropping the gradients. The base is wholly frozen; in all models the "
    "output of the embeddings requires a gradient, so that the base's backward runs through all layers. The base and an "
    f"adapted copy step in turn, {STEPS} times; the extra time is the median of the differences.",
    sides=BOTH,
    checks=(
        Check(
            "training step: extra time over the frozen base",
            Reading(OURS, "extra"),
            Reading(PEER, "extra"),
            Target(0.45),
        ),
        Check("the same step as a whole", Reading(OURS, "adapted"), Reading(PEER, "adapted")),
    ),
)


def measure(name: str) -> Readings:
    """Seconds of the adapted step, and how many more than the base's takes."""
    base = frozen_llama()
    adapted = with_lora(name, copy.deepcopy(base))
    return paired(training_step(base), training_step(adapted), calls=STEPS, warm_up=1)


if __name__ == "__main__":
    run(measure)
