"""Injecting adapters into the two largest open models, on the meta device."""

from __future__ import annotations

from benchmarks.measure import library, timed
from benchmarks.models import LARGE, on_meta
from benchmarks.row import OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target

LOW = f"{PEER} low"
SIDES = {OURS: (OURS,), PEER: (PEER,), LOW: (PEER, "low")}
TIMES = {"llama-3.1-405b": 10.0, "deepseek-v3": 50.0}


def _checks(model: str) -> tuple[Check, ...]:
    ours = Reading(f"{OURS} {model}", "inject")
    what = f"`get_peft_model` on {LARGE[model]}, meta device, `all-linear`"
    return (
        Check(what, ours, Reading(f"{PEER} {model}", "inject"), Target(TIMES[model], at_least=True)),
        Check(
            f"{what}; reference with `low_cpu_mem_usage=True`",
            ours,
            Reading(f"{LOW} {model}", "inject"),
            times=True,
        ),
    )


ROW = Row(
    title="Injection",
    how="`get_peft_model(model, LoraConfig(target_modules='all-linear', task_type='CAUSAL_LM'))` with everything else at its "
    "default; building the model is not counted. On DeepSeek-V3 the reference rewrites `all-linear` for the experts that "
    "transformers 5 fuses, so it does not adapt the same modules: ours are the linear layers that the model has.",
    sides={f"{side} {model}": (words[0], model, *words[1:]) for model in LARGE for side, words in SIDES.items()},
    checks=tuple(check for model in LARGE for check in _checks(model)),
    rounds=3,
)


def measure(name: str, model: str, low: str = "") -> Readings:
    """Seconds of one injection."""
    lib = library(name)
    base = on_meta(model)
    config = lib.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"low_cpu_mem_usage": True} if low else {}
    inject = lib.get_peft_model  # importing it belongs to the start, which has a row of its own
    with timed() as watch:
        adapted = inject(base, config, **options)
    assert any(parameter.requires_grad for parameter in adapted.parameters())
    return watch.readings("inject")


if __name__ == "__main__":
    run(measure)
