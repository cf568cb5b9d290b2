"""The cost of an adapter in training: how much more memory a step takes than that of the frozen base."""

from __future__ import annotations

from pathlib import Path

from benchmarks.models import frozen_llama, live_peak, training_step, with_lora
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target, Unit

STEPS = 3
BASE = "base"
#: Probability of dropping inputs, where they are.
DROPOUT = "0.1"
OURS_DROPPING, PEER_DROPPING = f"{OURS}, dropout", f"{PEER}, dropout"

ROW = Row(
    title="Training step, memory",
    how="The same models and step. Resident: how far the resident set of a fresh process rises over what it was before the "
    f"first of {STEPS} steps (`VmHWM` of `/proc/self/status`; the system's allocator as it comes), less the same for the "
    "base alone. Live tensors: what torch's allocator has handed out at the peak of one step, less the same for the base. "
    "The gradient of A needs the layers' inputs. The reference keeps them; here those that a norm or a product made are made "
    f"again from what their own backward keeps. With dropout of {DROPOUT} the reference keeps what is left of each input and the "
    "mask in the inputs' format, we a byte for each number.",
    sides={
        BASE: (BASE,),
        **BOTH,
        OURS_DROPPING: (OURS, DROPOUT),
        PEER_DROPPING: (PEER, DROPOUT),
    },
    checks=(
        Check(
            "training step: extra peak memory, resident",
            Reading(OURS, "resident", BASE),
            Reading(PEER, "resident", BASE),
            Target(0.3),
            Unit.BYTES,
        ),
        Check(
            "training step: extra peak memory, live tensors",
            Reading(OURS, "live", BASE),
            Reading(PEER, "live", BASE),
            Target(1.0),
            Unit.BYTES,
        ),
        Check(
            "the same with dropout",
            Reading(OURS_DROPPING, "live", BASE),
            Reading(PEER_DROPPING, "live", BASE),
            Target(0.6),
            Unit.BYTES,
        ),
    ),
)


def measure(side: str, dropout: str = "0") -> Readings:
    """Bytes that steps of one side need."""
    base = frozen_llama()
    step = training_step(base if side == BASE else with_lora(side, base, lora_dropout=float(dropout)))
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
