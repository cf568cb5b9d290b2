"""Adding a second adapter to a model of many targets."""

from __future__ import annotations

import gc

from benchmarks.measure import library, timed
from benchmarks.models import LINEARS, lora, tree
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target

TARGETS = 4200
#: Half and twice as many, for ours only: how time grows.
OTHERS = (2100, 8400)


def _growth(targets: int) -> Check:
    factor = targets / OTHERS[0]
    what = f"ours on {targets:,} targets against {OTHERS[0]:,} (linear is {factor:g})"
    return Check(what, Reading(OURS, f"add_{targets}"), Reading(OURS, f"add_{OTHERS[0]}"), Target(1.2 * factor))


ROW = Row(
    title="Second adapter",
    how="`model.add_adapter('second', config)` after `get_peft_model`, rank 4, on a module tree nested as a Llama model, with "
    "seven linear layers of 16 × 16 in each block.",
    sides=BOTH,
    checks=(
        Check(
            f"second adapter on {TARGETS:,} targets",
            Reading(OURS, f"add_{TARGETS}"),
            Reading(PEER, f"add_{TARGETS}"),
            Target(50, at_least=True),
        ),
        _growth(TARGETS),
        _growth(OTHERS[1]),
    ),
    rounds=3,
)


def measure(name: str) -> Readings:
    """Seconds of adding the second adapter; on more sizes for ours."""
    lib = library(name)
    _add(lib, 70)  # what is loaded on first use
    readings: dict[str, float] = {}
    for targets in (TARGETS, *OTHERS) if name == OURS else (TARGETS,):
        readings |= _add(lib, targets)
    return readings


def _add(lib: object, targets: int) -> dict[str, float]:
    model = lib.get_peft_model(tree(targets // len(LINEARS)), lora(lib, r=4))  # type: ignore[attr-defined]
    gc.collect()  # the model before
    with timed() as watch:
        model.add_adapter("second", lora(lib, r=4))
    assert sum(".second." in name for name, _ in model.named_parameters()) == 2 * targets
    return watch.readings(f"add_{targets}")


if __name__ == "__main__":
    run(measure)
