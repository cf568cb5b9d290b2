"""LN tuning: norms trained whole, as copies beside the frozen ones (Zhao et al., arXiv:2312.11420).

The method replaces every parameter of the layer's own, whatever the layer computes from them, so that any module with
parameters can be tuned. Of several active adapters the last one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from peftc.plugin import (
    Diagnostic,
    Kind,
    LayerFacts,
    MapTuner,
    ModulesToSaveMixin,
    PeftConfig,
    PeftType,
    Slot,
    SlotInit,
    TargetsMixin,
    TunerMethod,
    View,
    hookimpl,
    labelled,
    module_slot,
    rules,
    to_logical,
    to_stored,
)

if TYPE_CHECKING:
    from torch import Tensor

#: dtypes of parameters that can be trained; others hold packed or quantised numbers
_TRAINABLE = frozenset({"float16", "bfloat16", "float32", "float64"})


class LNTuningConfig(TargetsMixin, ModulesToSaveMixin, PeftConfig):
    """Options of an LN-tuning adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("LN_TUNING")


class LnTuner(MapTuner[LNTuningConfig]):
    """`y = f(x; θ)` with parameters `θ` of the adapter's own, which start as those of the layer."""

    supports = frozenset(Kind)

    def slots(self, c: LNTuningConfig, layer: LayerFacts) -> Iterable[Slot]:
        for name, tensor in layer.params:
            yield module_slot("ln_tuning_layers", tensor.shape, name)

    def init(self, c: LNTuningConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        base = init.base
        for label, slot in labelled(self.slots(c, layer)).items():
            slots[label].copy_(to_stored(layer, slot.tail, base[slot.tail]))

    def check(self, c: LNTuningConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        packed = [f"`{name}` ({tensor.dtype})" for name, tensor in layer.params if tensor.dtype not in _TRAINABLE]
        if packed:
            what = f"Of `{path}` {', '.join(packed)} holds numbers that no gradient can move"
            yield rules.BAD_TARGET(what, fix="Leave it out, or exclude it with `exclude_modules`.", where=path)

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        names = [name for name, _ in a.layer.params]
        if len(names) == 1:
            return {names[0]: to_logical(a.layer, names[0], a.ln_tuning_layers)}
        return {name: to_logical(a.layer, name, a[f"ln_tuning_layers.{name}"]) for name in names}


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "LN_TUNING",
        LNTuningConfig,
        LnTuner(),
        prefix="ln_tuning_",
        layer_names=("ln_tuning_layers",),
        model_class="LNTuningModel",
        layer_class="LNTuningLayer",
        default_targets={"target_modules": "lntuning"},
        summary="Norms are trained whole, as copies beside the frozen ones.",
        paper="arXiv:2312.11420",
    )
