"""A batch in which every row has an adapter of its own, beside the same batch with one adapter for all rows."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import library, paired
from benchmarks.models import llama, lora
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target

ROWS = 32
#: Tokens in each row: a step of generation, and a prompt.
TOKENS = (1, 16)
CALLS = 20

ROW = Row(
    title="One adapter for each row",
    how=f"A Llama of hidden size 512 and 8 layers in float32, `eval`, `no_grad`, {ROWS} rank-8 adapters on all 56 linear layers, "
    f"{ROWS} rows of {TOKENS[0]} and of {TOKENS[1]} tokens. The same batch is called with the active adapter for all rows and "
    f"with `adapter_names` naming another for each, in turn, {CALLS} times; both are medians. What is compared is one "
    "library with itself.",
    sides=BOTH,
    checks=tuple(
        Check(
            f"{ROWS} rows of {tokens} token{'s' * (tokens > 1)}: {ROWS} adapters against one, {who}",
            Reading(side, f"each_{tokens}"),
            Reading(side, f"one_{tokens}"),
            Target(1.3) if side == OURS else None,
        )
        for tokens in TOKENS
        for side, who in ((OURS, "ours"), (PEER, "the reference"))
    ),
    rounds=3,
)


def measure(name: str) -> Readings:
    """Seconds of a call with one adapter for all rows, and with one for each, by the number of tokens."""
    import torch

    lib = library(name)
    config = lora(lib, init_lora_weights=False)
    names = [f"a{index}" for index in range(ROWS)]
    model: Any = lib.get_peft_model(llama(), config, names[0])
    for adapter in names[1:]:
        model.add_adapter(adapter, config)
    model.eval()
    readings: dict[str, float] = {}
    for tokens in TOKENS:
        ids = torch.randint(0, 1024, (ROWS, tokens))
        with torch.no_grad():
            found = paired(
                lambda ids=ids: model(input_ids=ids, use_cache=False),
                lambda ids=ids: model(input_ids=ids, use_cache=False, adapter_names=names),
                calls=CALLS,
                warm_up=2,
            )
        for clock in ("cpu", "wall"):
            readings |= {
                f"one_{tokens}_{clock}": found[f"base_{clock}"],
                f"each_{tokens}_{clock}": found[f"adapted_{clock}"],
            }
    return readings


if __name__ == "__main__":
    run(measure)
