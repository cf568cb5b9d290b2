"""The cost of one active adapter where it weighs most: a forward of one token."""

from __future__ import annotations

import copy
from typing import Any

from benchmarks.measure import library, paired
from benchmarks.models import llama, lora
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target

CALLS = 100

ROW = Row(
    title="One-token forward",
    how="A Llama of hidden size 512 and 8 layers in float32, `eval`, `no_grad`, a rank-8 adapter on all 56 linear layers, not "
    f"merged. The bare base and an adapted copy are called in turn, {CALLS} times; the extra time is the median of the "
    "differences.",
    sides=BOTH,
    checks=(
        Check(
            "one-token forward, one LoRA active: extra time over the base",
            Reading(OURS, "extra"),
            Reading(PEER, "extra"),
            Target(0.4),
        ),
        Check("the same forward as a whole", Reading(OURS, "adapted"), Reading(PEER, "adapted")),
    ),
)


def measure(name: str) -> Readings:
    """Seconds of the adapted forward, and how many more than the base takes."""
    import torch

    lib = library(name)
    base = llama().eval()
    adapted = lib.get_peft_model(copy.deepcopy(base), lora(lib, init_lora_weights=False)).eval()
    token = torch.zeros(1, 1, dtype=torch.long)

    def forward(model: Any) -> None:
        model(input_ids=token, use_cache=False)

    with torch.no_grad():
        return paired(lambda: forward(base), lambda: forward(adapted), calls=CALLS, warm_up=20)


if __name__ == "__main__":
    run(measure)
