"""Loading 32 adapters beside each other, and switching them all off and on."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from benchmarks.measure import Watch, library, timed
from benchmarks.models import llama, lora
from benchmarks.row import OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target

LOADS = 32
SWITCHES = 20

ROW = Row(
    title="Loaded adapters",
    how="`PeftModel.from_pretrained` on a Llama of 32 layers and hidden size 64 (224 targets), then 32 times `load_adapter` of "
    "the same folder, which the library itself saved; a load on another model goes first and is not counted. Ours repeats "
    "this on three models and takes the median. Then `with model.disable_adapter(): pass`, the mean of 20.",
    sides={OURS: (OURS, "3"), PEER: (PEER, "1")},
    checks=(
        Check("32nd `load_adapter`", Reading(OURS, "last"), Reading(PEER, "last"), Target(20, at_least=True)),
        Check("32nd `load_adapter` against our first", Reading(OURS, "last"), Reading(OURS, "first"), Target(1.2)),
        Check(
            "`disable_adapter` enter and exit, 32 loaded",
            Reading(OURS, "disable"),
            Reading(PEER, "disable"),
            Target(20, at_least=True),
        ),
    ),
    rounds=3,
)


def measure(name: str, repeats: str) -> Readings:
    """Seconds of the first and the 32nd load, and of switching off and on with all loaded."""
    lib = library(name)
    with tempfile.TemporaryDirectory() as folder:
        lib.get_peft_model(_base(), lora(lib, init_lora_weights=False)).save_pretrained(folder)
        lib.PeftModel.from_pretrained(_base(), folder).load_adapter(folder, "other")
        series = []
        for _ in range(int(repeats)):
            model = lib.PeftModel.from_pretrained(_base(), folder)
            series.append([_load(model, folder, f"a{index}") for index in range(LOADS)])
    assert len(model.peft_config) == LOADS + 1
    with timed() as disabling:
        for _ in range(SWITCHES):
            with model.disable_adapter():
                pass
    first, last = (_median([loads[index] for loads in series]) for index in (0, -1))
    return {**first.readings("first"), **last.readings("last"), **disabling.readings("disable", SWITCHES)}


def _base() -> Any:
    return llama(hidden_size=64, intermediate_size=172, num_hidden_layers=32, vocab_size=128)


def _load(model: Any, folder: str, adapter: str) -> Watch:
    with timed() as watch:
        model.load_adapter(folder, adapter)
    return watch


def _median(watches: list[Watch]) -> Watch:
    return Watch(statistics.median(w.cpu for w in watches), statistics.median(w.wall for w in watches))


if __name__ == "__main__":
    run(measure)
