"""SSF: what a layer puts out is scaled and shifted, feature by feature (Lian et al., arXiv:2210.08823, equation 3)."""

from __future__ import annotations

from peftc import plugin as p


class SsfConfig(p.LayersConfig):
    """Which layers; the method has no option of its own."""

    peft_type: p.PeftType | None = p.PeftType("SSF")


class Ssf(p.MapTuner[SsfConfig]):
    """`y = γ ⊙ (W x + b) + β`, merged into weight and bias."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS

    def slots(self, c: SsfConfig, layer: p.LayerFacts) -> p.Slots:
        yield p.parameter_slot("ssf_scale", (layer.out_features,))
        yield p.parameter_slot("ssf_shift", (layer.out_features,))

    def init(self, c: SsfConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        init.ones(slots["ssf_scale"])
        init.zeros(slots["ssf_shift"])

    def output(self, a: p.View[SsfConfig], y: p.Tensor) -> p.Tensor:
        return y * a.ssf_scale + a.ssf_shift


peftc_tuner = p.method(SsfConfig, Ssf(), prefix="ssf_", layer_names=("ssf_scale", "ssf_shift"))
