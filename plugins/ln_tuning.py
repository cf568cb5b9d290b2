"""LN tuning: norms are trained whole, as copies beside the frozen ones (Zhao et al., arXiv:2312.11420).

The method replaces every parameter of the layer's own, whatever the layer computes from them, so that any module with
parameters can be tuned.
"""

from __future__ import annotations

from peftc import plugin as p

#: dtypes of parameters that can be trained; others hold packed or quantised numbers
_TRAINABLE = frozenset({"float16", "bfloat16", "float32", "float64"})


class LNTuningConfig(p.TargetsMixin, p.ModulesToSaveMixin, p.PeftConfig):
    """Options of an LN-tuning adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("LN_TUNING")


class LnTuner(p.MapTuner[LNTuningConfig]):
    """`y = f(x; θ)` with parameters `θ` of the adapter's own, which start as those of the layer."""

    supports = frozenset(p.Kind)

    def slots(self, c: LNTuningConfig, layer: p.LayerFacts) -> p.Slots:
        for name, tensor in layer.params.items():
            yield p.module_slot("ln_tuning_layers", tensor.shape, name)

    def init(self, c: LNTuningConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        base = init.base
        for label, slot in p.labelled(self.slots(c, layer)).items():
            slots[label].copy_(p.to_stored(layer, slot.tail, base[slot.tail]))

    def check(self, c: LNTuningConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        packed = [f"`{name}` ({facts.dtype})" for name, facts in layer.params.items() if facts.dtype not in _TRAINABLE]
        if packed:
            what = f"Of `{path}` {', '.join(packed)} holds numbers that no gradient can move"
            yield p.rules.BAD_TARGET(what, fix="Leave it out, or exclude it with `exclude_modules`.", where=path)

    def clash(self, c: LNTuningConfig, other: LNTuningConfig) -> str:
        return "both have all parameters of the layer in a copy of their own"

    def params(self, a: p.View[LNTuningConfig], w: p.Tensors, w0: p.Tensors) -> p.Tensors:
        label = "ln_tuning_layers" if len(a.layer.params) == 1 else "ln_tuning_layers.{}"
        return {name: p.to_logical(a.layer, name, a[label.format(name)]) for name in a.layer.params}


peftc_tuner = p.method(LNTuningConfig, LnTuner(), prefix="ln_tuning_", layer_names=("ln_tuning_layers",))
