"""A method's mathematics on a layer whose weight is that of an adapted embedding, read the other way round: the same tensors.

Where `ΔW = s · B A` is the embedding's change, that of the layer is its transpose, `s · Aᵀ Bᵀ`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from peftc.config.base import PeftConfig
from peftc.graph.nodes import Kind, LayerFacts
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.tuner.views import SlotInit, View


class Transposed(MapTuner[Any]):
    """The mathematics `one` of an embedding, on a linear layer with the same weight."""

    supports = frozenset({Kind.LINEAR})

    def __init__(self, one: MapTuner[Any]) -> None:
        self.one = one

    def slots(self, c: PeftConfig, layer: LayerFacts) -> Iterable[Slot]:
        return self.one.slots(c, mirrored(layer))

    def init(self, c: PeftConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        self.one.init(c, mirrored(layer), slots, init)

    def scaling(self, c: PeftConfig, layer: LayerFacts) -> float:
        return self.one.scaling(c, mirrored(layer))

    def dropout(self, c: PeftConfig) -> float:
        return self.one.dropout(c)

    def of_rank(self, c: PeftConfig, rank: int) -> PeftConfig | None:
        found: PeftConfig | None = self.one.of_rank(c, rank)
        return found

    def of_thin(self, c: PeftConfig, layer: LayerFacts, A: Tensor, B: Tensor) -> Mapping[str, Tensor]:
        return self.one.of_thin(c, mirrored(layer), B.t(), A.t())

    def thin(self, a: View[Any]) -> tuple[Tensor, Tensor, float]:
        A, B, scale = self.one.thin(_Mirrored(a))
        return B.t(), A.t(), scale


class _Mirrored:
    """A view of the layer as the embedding."""

    def __init__(self, a: View[Any]) -> None:
        self._a = a
        self.layer = mirrored(a.layer)

    def __getitem__(self, label: str) -> Tensor:
        return self._a[label]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._a, name)


@cache
def mirrored(layer: LayerFacts) -> LayerFacts:
    """Facts of an embedding that has a linear layer's weight."""
    return LayerFacts(Kind.EMBEDDING, layer.cls, layer.out_features, layer.in_features, params=layer.params)


@cache
def transposed(one: MapTuner[Any]) -> Transposed:
    """The mathematics of an embedding on a layer tied to it; one object for one."""
    return Transposed(one)


def can_transpose(one: MapTuner[Any]) -> bool:
    """Whether all that a mathematics does is a thin update, which has a transpose."""
    return one.lowerings == {"thin"} and not one.seams and type(one).declare is MapTuner.declare
