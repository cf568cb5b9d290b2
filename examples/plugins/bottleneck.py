"""Bottleneck: a small network after each layer, added to what it puts out (Houlsby et al., arXiv:1902.00751, section 2.1)."""

from __future__ import annotations

from peftc import plugin as p


class BottleneckConfig(p.LayersConfig):
    """Options of a bottleneck adapter."""

    peft_type: p.PeftType | None = p.PeftType("BOTTLENECK")
    width: p.Count = 16
    """Width of the network's one hidden layer."""


class Bottleneck(p.MapTuner[BottleneckConfig]):
    """`y + U tanh(D y + d) + u`, which is no change of the layer's weight."""

    supports = p.LINEAR_KINDS
    beside = "the network between its two layers is not linear"

    def slots(self, c: BottleneckConfig, layer: p.LayerFacts) -> p.Slots:
        yield from p.linear_slots("bottleneck_down", layer.out_features, c.width)
        yield from p.linear_slots("bottleneck_up", c.width, layer.out_features)

    def init(self, c: BottleneckConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        init.kaiming_uniform(slots["bottleneck_down.weight"])
        for label in ("bottleneck_down.bias", "bottleneck_up.weight", "bottleneck_up.bias"):
            init.zeros(slots[label])

    def branch(self, a: p.View[BottleneckConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        return p.linear(a, "bottleneck_up", p.linear(a, "bottleneck_down", y0.to(x.dtype)).tanh())


peftc_tuner = p.method(
    BottleneckConfig,
    Bottleneck(),
    prefix="bottleneck_",
    layer_names=("bottleneck_down", "bottleneck_up"),
    examples=({"width": 3},),
)
