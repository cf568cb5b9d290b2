"""The cost of an adapter in training: how much more memory a step takes than that of the frozen base."""

from __future__ import annotations

from pathlib import Path

from benchmarks.models import frozen_llama, live_peak, training_step, with_lora
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target, Unit

STEPS = 3
BASE = "base"

ROW = Row(
    title="Training step, memory",
    how="The same models and step. Resident: how far the resident set of a fresh process rises over what it was before the "
    f"first of {STEPS} steps (`VmHWM` of `/proc/self/status`; the system's allocator as it comes), less the same for the "
    "base alone. Live tensors: what torch's allocator has handed out at the peak of one step, less the same for the base. "
    "Both libraries keep the layers' inputs there for the gradient of A, so this part cannot shrink; the rest of the "
    "resident set is what transient tensors leave behind.",
    sides={BASE: (BASE,), **BOTH},
    checks=(
        Check(
            "training step: extra peak memory, resident",
            Reading(OURS, "resident", BASE),
            Reading(PEER, "resident", BASE),
            Target(0.5),
            Unit.BYTES,
        ),
        Check(
            "training step: extra peak memory, live tensors",
            Reading(OURS, "live", BASE),
            Reading(PEER, "live", BASE),
            unit=Unit.BYTES,
        ),
    ),
)


def measure(side: str) -> Readings:
    """Bytes that steps of one side need."""
    base = frozen_llama()
    step = training_step(base if side == BASE else with_lora(side, base))
    before = _status("VmRSS")
    for _ in range(STEPS):
        step()
    return {"resident": _status("VmHWM") - before, "live": live_peak(step)}


def _status(field: str) -> float:
    """Bytes of a field of `/proc/self/status`. Raises `KeyError`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return float(fields[field].split()[0]) * 1024


if __name__ == "__main__":
    run(measure)
