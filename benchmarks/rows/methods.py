"""What methods cost beside LoRA: a training step's time and memory as multiples of those with LoRA."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import library, paired
from benchmarks.models import ATTENTION, frozen_llama, live_peak, training_step
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target, Unit

STEPS = 3


@dataclass(frozen=True)
class Budget:
    """Options that give a method about as many parameters as LoRA's rank 8, and what multiple of LoRA it may cost."""

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bound: float | None = None


#: LoRA of rank 8 has 8,192 parameters on a layer of 512 × 512.
METHODS: Mapping[str, Budget] = {
    "HRA": Budget("HRAConfig", {"r": 16}, 2.0),
    "BOFT": Budget("BOFTConfig", {"boft_block_size": 8, "boft_n_butterfly_factor": 2}, 2.5),
    "FOURIERFT": Budget("FourierFTConfig", {"n_frequency": 8192}, 1.5),
    "LOHA": Budget("LoHaConfig", {"r": 4}, 2.0),
    "LOKR": Budget("LoKrConfig", {"r": 8}, 2.0),
    "OFT": Budget("OFTConfig", {"r": 0, "oft_block_size": 32}, 2.0),
    "HIRA": Budget("HiraConfig", {"r": 8}),
    "VERA": Budget("VeraConfig", {"r": 256}),
    "ADALORA": Budget("AdaLoraConfig", {"init_r": 8, "total_step": 100}),
}


def _checks(name: str, bound: float | None) -> tuple[Check, ...]:
    checks = []
    for metric in ("time", "memory"):
        ours, theirs = (Reading(side, f"{name}_{metric}") for side in (OURS, PEER))
        what = f"{name}: {metric} of a step, LoRA's is 1"
        if bound is not None:
            checks.append(Check(what, ours, None, Target(bound), Unit.NUMBER))
        least = None if bound is None else Target(1.0)
        checks.append(Check(f"{what}; against the reference's", ours, theirs, least, Unit.NUMBER))
    checks.append(Check(f"{name}: the step itself", *(Reading(side, f"{name}_step") for side in (OURS, PEER))))
    return tuple(checks)


ROW = Row(
    title="Methods beside LoRA",
    how="A Llama of hidden size 512, intermediate size 1,376 and 8 layers in float32, adapted in q, k, v and o, 4 × 256 tokens; "
    "options give about as many parameters as LoRA's rank 8. A step is that of the training rows. Two copies of the model, one "
    f"with LoRA and one with the method of the same library, step in turn, {STEPS} times: time is the median CPU time of the "
    "method's step over the median of LoRA's, memory what torch's allocator has handed out at the peak of a step, "
    "beyond what it had before, over the same with LoRA.",
    sides=BOTH,
    rounds=3,
    checks=tuple(check for name, budget in METHODS.items() for check in _checks(name, budget.bound)),
)


def measure(side: str, *names: str) -> Readings:
    """Multiples of LoRA's time and memory for every method of one side, or those named."""
    lib = library(side)
    base = frozen_llama()
    lora = training_step(_adapted(lib, base, Budget("LoraConfig", {"r": 8})))
    lora()
    peak = live_peak(lora)
    readings: dict[str, float] = {}
    for name in names or METHODS:
        budget = METHODS[name]
        step = training_step(_adapted(lib, base, budget))
        seconds = paired(lora, step, calls=STEPS, warm_up=1)
        readings |= {f"{name}_step_{clock}": seconds[f"adapted_{clock}"] for clock in ("cpu", "wall")}
        readings[f"{name}_time"] = seconds["adapted_cpu"] / seconds["base_cpu"]
        readings[f"{name}_memory"] = live_peak(step) / peak
    return readings


def _adapted(lib: Any, base: Any, budget: Budget) -> Any:
    """A copy of the model with an adapter."""
    config = getattr(lib, budget.config)(target_modules=list(ATTENTION), **budget.options)
    return lib.get_peft_model(copy.deepcopy(base), config).train()


if __name__ == "__main__":
    run(measure)
