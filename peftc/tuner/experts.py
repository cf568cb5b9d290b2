"""A method's mathematics of linear layers on a stack of them, as fused experts are: the core does one after the other what
the method does on one. Every slot gets a leading dimension, but for those that the layers of a model have in common.

Methods whose tensors hold all experts in a way of their own say so (`MapTuner.stacks_experts`), and none of this is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic
from peftc.graph.nodes import EXPERT_KINDS, Kind, LayerFacts, ModuleNode
from peftc.graph.tensors import FactsByName, TensorFacts
from peftc.tuner.maps import Former, MapTuner
from peftc.tuner.method import TunerMethod
from peftc.tuner.slots import Slot, labelled

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.tuner.views import SlotInit

#: Seams that are for tensors as the method made them.
_WHOLE = frozenset({"on_step", "loss", "export", "restore"})


class PerExpert(MapTuner[PeftConfig]):
    """The mathematics `one` of a linear layer for each expert. It has no lowerings: the runtime folds those of `one` into
    the weight of every expert."""

    supports = EXPERT_KINDS
    stacks_experts = True

    def __init__(self, one: MapTuner[Any]) -> None:
        self.one = one

    def slots(self, c: PeftConfig, layer: LayerFacts) -> Iterable[Slot]:
        for slot in self.one.slots(c, one_of(layer)):
            yield slot if _is_common(slot) else replace(slot, shape=(layer.experts, *slot.shape))

    def stacked(self, c: PeftConfig, layer: LayerFacts) -> frozenset[str]:
        """Labels of the slots in which each expert has its own part."""
        return frozenset(label for label, slot in labelled(self.slots(c, layer)).items() if not _is_common(slot))

    def init(self, c: PeftConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        facts, stacked, name = one_of(layer), self.stacked(c, layer), next(iter(layer.params))
        for index in range(layer.experts):
            own = {label: tensor[index] if label in stacked else tensor for label, tensor in slots.items()}
            self.one.init(c, facts, own, init.of_expert(name, index))
            self.one.settle(c, facts, own, init.of_expert(name, index))

    def settle(self, c: PeftConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        """Done by `init`, expert by expert."""

    def derive(self, c: PeftConfig, layer: LayerFacts, slots: Mapping[str, Slot]) -> Mapping[str, Tensor]:
        return self.one.derive(c, one_of(layer), slots)

    def scaling(self, c: PeftConfig, layer: LayerFacts) -> float:
        return self.one.scaling(c, one_of(layer))

    def dropout(self, c: PeftConfig) -> float:
        return self.one.dropout(c)

    def check(self, c: PeftConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        return self.one.check(c, one_of(layer), path)

    def declared_problems(self, c: PeftConfig, layer: LayerFacts, path: str) -> Iterator[Diagnostic]:
        return self.one.declared_problems(c, one_of(layer), path)

    def clash(self, c: PeftConfig, other: PeftConfig) -> str:
        return self.one.clash(c, other)

    def joined(
        self, c: PeftConfig, layer: LayerFacts, label: str, experts: Sequence[Sequence[Former[Tensor] | None]]
    ) -> Tensor:
        """Slots of single layers, stacked; of one that experts have in common any layer's."""
        values = [former.value for expert in experts for former in expert if former is not None]
        if label not in self.stacked(c, layer):
            return values[0]
        held = values[0].new_empty((len(values), *values[0].shape))
        for own, value in zip(held, values, strict=True):
            own.copy_(value)
        return held

    def parted(
        self, c: PeftConfig, layer: LayerFacts, parts: int, slots: Mapping[str, Tensor]
    ) -> Sequence[Sequence[Mapping[str, Tensor]]]:
        stacked = self.stacked(c, layer)
        return [
            [{label: tensor[index] if label in stacked else tensor for label, tensor in slots.items()}]
            for index in range(layer.experts)
        ]

    @property
    def joins(self) -> bool:
        """Slots of layers that were joined by rows cannot be stacked."""
        return False

    @property
    def is_mergeable(self) -> bool:
        return self.one.is_mergeable

    @property
    def obstacle(self) -> str:
        """What of the method cannot be done expert by expert; empty if nothing."""
        seams = self.one.seams & _WHOLE
        if seams:
            return f"`{min(seams)}`, which is for a layer's tensors as a whole"
        if type(self.one).declare is not MapTuner.declare:
            return "`declare`, by which slots depend on other layers"
        if self.one.keywords:
            return "keywords of calls, and experts see no rows of a batch"
        return "" if self.one.is_mergeable else "no lowering that says how a weight changes"


@cache
def per_expert(one: MapTuner[Any]) -> PerExpert:
    """The mathematics on stacks of experts; one object for one."""
    return PerExpert(one)


def tuner_for(method: TunerMethod, config: PeftConfig, node: ModuleNode) -> MapTuner[Any]:
    """The mathematics of a method for one site, a layer or a stack of experts."""
    tuner = method.chosen_for(config, node)
    if tuner.stacks_experts or not node.facts.experts or node.facts.kind not in tuner.supports:
        return tuner
    return per_expert(tuner)


@cache
def one_of(layer: LayerFacts) -> LayerFacts:
    """Facts of one expert as a linear layer without bias."""
    weight = TensorFacts((layer.out_features, layer.in_features), next(iter(layer.params.values())).dtype)
    return LayerFacts(
        Kind.LINEAR, layer.cls, layer.in_features, layer.out_features, params=FactsByName({"weight": weight})
    )


def _is_common(slot: Slot) -> bool:
    """Whether all experts have the slot together: it is no part of what is learnt of one."""
    return slot.derived or bool(slot.share)
