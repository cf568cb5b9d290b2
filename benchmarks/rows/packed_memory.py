"""What training on 4-bit weights takes in memory: whether anything of full precision is kept beside them."""

from __future__ import annotations

from typing import Any

from benchmarks.models import frozen_llama, live_peak, training_step, with_lora
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target, Unit

BASE = "base"
#: Adapters whose update needs the numbers of the weight.
OPENS = "opens"
OURS_OPENING, PEER_OPENING = f"{OURS}, DoRA", f"{PEER}, DoRA"

ROW = Row(
    title="Training step over 4-bit weights, memory",
    how="The model of the training step with its linear layers in bitsandbytes' nf4, scales quantised too, rank 8 on all 56. Live "
    "tensors: what torch's allocator has handed out at the peak of one step, less the same for the base alone; and with DoRA, "
    "which needs the weights' norms. In an environment with bitsandbytes (`make test-bases` makes one).",
    sides={
        BASE: (BASE,),
        **BOTH,
        OURS_OPENING: (OURS, OPENS),
        PEER_OPENING: (PEER, OPENS),
    },
    checks=(
        Check(
            "4-bit step: extra peak memory",
            Reading(OURS, "live", BASE),
            Reading(PEER, "live", BASE),
            Target(1.0),
            Unit.BYTES,
        ),
        Check(
            "the same with DoRA",
            Reading(OURS_OPENING, "live", BASE),
            Reading(PEER_OPENING, "live", BASE),
            Target(1.0),
            Unit.BYTES,
        ),
    ),
)


def measure(side: str, opens: str = "") -> Readings:
    """Bytes that a step of one side needs."""
    base = in_four_bits(frozen_llama())
    model = base if side == BASE else with_lora(side, base, use_dora=bool(opens))
    step = training_step(model.train())
    step()
    return {"live": live_peak(step)}


def in_four_bits(model: Any) -> Any:
    """A model with the linear layers of its blocks in nf4."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn

    for parent in list(model.model.layers.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                made = Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4", device="meta")
                made.weight = Params4bit(child.weight.data, quant_type="nf4", module=made).to("cpu")
                setattr(parent, name, made)
    return model


if __name__ == "__main__":
    run(measure)
