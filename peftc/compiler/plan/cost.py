"""What a plan costs: parameters, bytes on disk, and the memory that training needs besides activations.

The file's size is exact. Memory is that with an optimiser, AdamW if none is said, whose states are, like the gradient, in the
parameter's dtype; activations depend on the batch and are not in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from peftc.compiler.plan.adapter import AdapterPlan, Tally
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.sites import MapSite
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import ModelFacts
from peftc.graph.tensors import TensorFacts
from peftc.registry.manager import default_registry
from peftc.registry.optimizers import ChosenOptimizer, chosen_optimizer
from peftc.registry.starts import known_start
from peftc.tuner.optimizer import factors

#: Bytes of a number that a change of a base weight follows from.
FLOAT = 4

#: dtypes as safetensors calls them
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes: of the frozen base, of what the adapters add, and of what training them keeps beside."""

    base: int
    adapters: int
    gradients: int
    optimiser: int
    #: base weights that starts change, kept as they were, with what the change follows from
    originals: int = 0

    @property
    def training(self) -> int:
        """All of it: the memory of a training step without activations."""
        return self.base + self.adapters + self.gradients + self.optimiser + self.originals


def cost_of(plan: InjectionPlan, chosen: ChosenOptimizer | None = None) -> Cost:
    """The plan's memory, trained by this optimiser; left out, by AdamW."""
    chosen = chosen or chosen_optimizer(None, None)
    added = trained = kept = 0
    for adapter in plan.adapters:
        tally = adapter.tally()
        added += _bytes(tally.added) + sum(TensorFacts(b.shape, b.dtype).nbytes for b in adapter.buffers())
        if plan.is_trained(adapter):
            gradients, states = _moved(adapter, tally, chosen)
            trained, kept = trained + gradients, kept + states
    originals = sum(_originals(adapter) for adapter in plan.adapters)
    return Cost(plan.base_bytes, added, trained, kept, originals)


def _moved(adapter: AdapterPlan, tally: Tally, chosen: ChosenOptimizer) -> tuple[int, int]:
    """Bytes of an adapter's gradients, and of what the optimiser keeps."""
    record, counts = chosen.record, tally.shapes.copy()
    for site, slot in adapter.slots() if record.freezes else ():
        if isinstance(site, MapSite) and record.fits(site.layer, site.slots):
            pair = factors(site.slots)
            counts[slot.shape, slot.dtype or site.dtype] -= pair is not None and slot is pair[0]
    gradients = sum(number * TensorFacts(shape, dtype).nbytes for (shape, dtype), number in counts.items())
    states = sum(
        number * TensorFacts((record.keeps(chosen.options, shape),), dtype).nbytes
        for (shape, dtype), number in counts.items()
    )
    return gradients, states


def _originals(adapter: AdapterPlan) -> int:
    """What an adapter whose start changes base weights keeps of them, and beside them."""
    try:
        chosen = known_start(default_registry().method_of(adapter.config), adapter.config)
    except PeftcError:  # a plan is shown where its method is not installed, too
        return 0
    if chosen is None or not chosen.start.changes_base:
        return 0
    sites = [site for site in adapter.maps if chosen.acts_on(site.layer)]
    weights = sum(site.layer.weight.nbytes for site in sites if site.layer.weight is not None)
    sizes = ((site.slots[0].shape[0], site.layer) for site in sites)
    return weights + sum(FLOAT * rank * (layer.fan_in + layer.out_features) for rank, layer in sizes)


def _bytes(numbers: Mapping[str, int]) -> int:
    return sum(TensorFacts((number,), dtype).nbytes for dtype, number in numbers.items())


def file_bytes(adapter: AdapterPlan, model: ModelFacts) -> int:
    """Size of the adapter's `adapter_model.safetensors`, to the byte.

    A safetensors file is eight bytes of length, a JSON header padded to a multiple of eight, and the tensors.
    """
    tensors = dict(adapter.stored(model))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes // max(tensors[name].numel, 1), name)):
        facts = tensors[name]
        begin, end = end, end + facts.nbytes
        code = _CODES.get(facts.dtype, facts.dtype)
        header[name] = {"dtype": code, "shape": list(facts.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8 + end


def trainable_by_role(plan: InjectionPlan) -> Mapping[str, int]:
    """Trainable parameters by what the adapted layer is for (`q`, `down`, …), in the order met.

    `other` are layers whose names do not tell; `around modules`, `saved modules`, `biases` and `prompt` are what their
    names say.
    """
    found: Counter[str] = Counter()
    for adapter in plan.adapters:
        if not plan.is_trained(adapter):
            continue
        for site in adapter.maps:
            found[site.role.value if site.role else "other"] += sum(slot.numel for slot in site.slots if slot.trainable)
        found["around modules"] += sum(slot.numel for site in adapter.modules for slot in site.slots if slot.trainable)
        found["saved modules"] += sum(facts.numel for save in adapter.saves for _, facts in save.tensors)
        found["biases"] += sum(train.tensor.numel for train in adapter.trains)
        if adapter.prompt is not None:
            found["prompt"] += sum(slot.numel for slot in adapter.prompt.slots if slot.trainable)
    return {role: count for role, count in found.items() if count}
