"""A variant of a stranger's, for methods that have variants: each output has a gate of its own over the low-rank update."""

from __future__ import annotations

from typing import Any

from peftc import plugin as p


class GateOptions(p.ConfigModel):
    start: float = p.Field(default=1.0, gt=0)


class Gated(p.MapTuner[Any]):
    supports = p.LINEAR_KINDS

    def slots(self, c: Any, layer: p.LayerFacts) -> p.Slots:
        yield p.module_slot("lora_A", (c.r, layer.in_features))
        yield p.module_slot("lora_B", (layer.out_features, c.r))
        yield p.parameter_slot("lora_gate", (layer.out_features,))

    def init(self, c: Any, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        init.kaiming_uniform(slots["lora_A"])
        init.zeros(slots["lora_B"])
        init.fill(slots["lora_gate"], p.variant_options(c, GateOptions).start)

    def thin(self, a: p.View[Any]) -> p.Factors:
        return a.lora_A, a.lora_B * a.lora_gate.unsqueeze(1), a.scaling


@p.hookimpl
def peftc_variant() -> p.Variant[Any]:
    return p.Variant("LORA", "gated", Gated(), options=GateOptions, layer_names=("lora_gate",))
