"""Planning the two largest open models: with the graph in the cache, and without it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import imported, whole_process
from benchmarks.models import LARGE, config_file
from benchmarks.row import OURS, Row, run
from benchmarks.table import Check, Reading, Readings, Target, Unit

ALONE = "transformers"
#: The cold plan is compared by a difference of two large numbers: each is the smallest of so many.
TRIES = 3
HEAVY = ("torch", "transformers")
BUILD = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model(**json.load(open(sys.argv[1])))
with torch.device("meta"):
    AutoModelForCausalLM.from_config(config)
"""


def _checks(model: str) -> tuple[Check, ...]:
    ours = f"{OURS} {model}"
    plan = f"`peftc plan` of {LARGE[model]}, `all-linear`"
    return (
        Check(f"{plan}, cached", Reading(ours, "cached"), target=Target(1.0)),
        Check(f"{plan}, cached: peak memory", Reading(ours, "cached_peak"), target=Target(150e6), unit=Unit.BYTES),
        Check(
            f"{plan}, cached: modules of {' and '.join(HEAVY)} imported",
            Reading(ours, "heavy"),
            target=Target(0),
            unit=Unit.NUMBER,
        ),
        Check(
            f"{plan}, cold: beyond transformers' own time",
            Reading(ours, "cold", f"{ALONE} {model}"),
            target=Target(0.5),
        ),
    )


ROW = Row(
    title="Plan",
    how="Whole processes of `python -m peftc plan` on a spec whose base is a config file of `examples/configs`, each with "
    "its own empty cache at first. Transformers' own time is that of a process that builds the same model from the same "
    f"file on the meta device. Cold times are the smallest of {TRIES} in each round.",
    sides={f"{side} {model}": (side, model) for model in LARGE for side in (OURS, ALONE)},
    checks=tuple(check for model in LARGE for check in _checks(model)),
    rounds=3,
)


def measure(side: str, model: str) -> Readings:
    """Readings of our command on one model, or of transformers alone."""
    if side == ALONE:
        build = [sys.executable, "-c", BUILD, str(config_file(model))]
        return _fastest([whole_process(build, "cold") for _ in range(TRIES)])
    with tempfile.TemporaryDirectory() as folder:
        argv = ["-m", "peftc", "plan", str(_spec(model, Path(folder)))]
        caches = [{"PEFTC_CACHE": str(Path(folder, f"cache{index}"))} for index in range(TRIES)]
        cold = _fastest([whole_process([sys.executable, *argv], "cold", cache) for cache in caches])
        cached = whole_process([sys.executable, *argv], "cached", caches[0])
        return {**cold, **cached, "heavy": imported(argv, HEAVY, caches[0])}


def _fastest(tries: list[dict[str, float]]) -> dict[str, float]:
    return min(tries, key=lambda readings: readings["cold_cpu"])


def _spec(model: str, folder: Path) -> Path:
    path = folder / "adapter.json"
    spec = {
        "version": 1,
        "base": {"config": str(config_file(model)), "task_type": "CAUSAL_LM"},
        "adapters": {"default": {"peft_type": "LORA", "target_modules": "all-linear"}},
    }
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


if __name__ == "__main__":
    run(measure)
