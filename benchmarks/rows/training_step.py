"""The cost of an adapter in training: time and memory of a step over those of the frozen base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import library, paired
from benchmarks.models import llama, lora
from benchmarks.row import OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target, Unit

BATCH, TOKENS = 4, 256
STEPS = 8
BASE = "base"


def _memory(side: str) -> str:
    return f"{side} memory"


ROW = Row(
    title="Training step",
    how="A Llama of hidden size 512, intermediate size 1,376 and 8 layers in float32, rank 8 on all 56 linear layers, 4 × 256 "
    "tokens. A step is forward, loss, backward and dropping the gradients. The base is wholly frozen; in all models the "
    "output of the embeddings requires a gradient, so that the base's backward runs through all layers. Time: the base and "
    f"an adapted copy step in turn, {STEPS} times; the extra time is the median of the differences. Peak memory: how far "
    "the resident set of a fresh process rises over what it was before the first of four steps (`VmHWM` in "
    "`/proc/self/status`, the system's allocator as it comes), less the same for the base alone. Live tensors are what "
    "torch's allocator has handed out at the peak of one step; both libraries must keep the inputs of the layers for the "
    "gradient of A there, and the rest of the resident set is what transient copies leave behind.",
    sides={
        OURS: (OURS, "time"),
        PEER: (PEER, "time"),
        **{_memory(side): (side, "memory") for side in (BASE, OURS, PEER)},
    },
    checks=(
        Check(
            "training step: extra time over the frozen base",
            Reading(OURS, "extra"),
            Reading(PEER, "extra"),
            Target(0.6),
        ),
        Check(
            "training step: extra peak memory, resident",
            Reading(_memory(OURS), "resident", _memory(BASE)),
            Reading(_memory(PEER), "resident", _memory(BASE)),
            Target(0.5),
            Unit.BYTES,
        ),
        Check(
            "training step: extra peak memory, live tensors",
            Reading(_memory(OURS), "live", _memory(BASE)),
            Reading(_memory(PEER), "live", _memory(BASE)),
            unit=Unit.BYTES,
        ),
        Check("the same step as a whole", Reading(OURS, "adapted"), Reading(PEER, "adapted")),
    ),
)


def measure(side: str, what: str) -> Readings:
    """Readings of one side: `time` or `memory`."""
    return _time(side) if what == "time" else _bytes(side)


def _time(name: str) -> Readings:
    base = _frozen()
    adapted = _adapted(name, copy.deepcopy(base))
    return paired(_step(base), _step(adapted), calls=STEPS, warm_up=2)


def _bytes(side: str) -> Readings:
    model = _frozen()
    if side != BASE:
        model = _adapted(side, model)
    step = _step(model)
    before = _status("VmRSS")
    for _ in range(4):
        step()
    return {"resident": _status("VmHWM") - before, "live": _live_peak(step)}


def _frozen() -> Any:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = llama()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model.train()


def _adapted(name: str, model: Any) -> Any:
    lib = library(name)
    return lib.get_peft_model(model, lora(lib, init_lora_weights=False)).train()


def _step(model: Any) -> Callable[[], None]:
    import torch

    ids = torch.randint(0, model.config.vocab_size, (BATCH, TOKENS))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _status(field: str) -> float:
    """Bytes of a field of `/proc/self/status`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return float(value.split()[0]) * 1024
    raise KeyError(field)


def _live_peak(step: Callable[[], None]) -> float:
    """Most bytes that torch's CPU allocator has handed out at once during a step, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return float(peak)


if __name__ == "__main__":
    run(measure)
