"""Whether the factors of a thin update are tensors as they are stored, and which: found by asking the mathematics once, of a view
that notes what is read.

What then says all of an update are two tensors and a number: nothing has to be asked again at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftc.runtime.layer.parts import Part
from peftc.runtime.slots.views import LayerView


@dataclass(frozen=True, slots=True)
class Stored:
    """Labels of the slots that are A and B, and the scale. `is_scaling` says that the scale is the layer's scaling as it is;
    `is_settled` that nothing else was read that may change, so that the answer stays while dtypes do."""

    first: str
    second: str
    scale: float
    is_scaling: bool
    is_settled: bool


class _Noting:
    """A view that notes which slots and what else is read of another."""

    def __init__(self, view: LayerView) -> None:
        self._view = view
        self._scaling = view.scaling * 1.0  # an object of its own, told from any other number
        self._given: dict[int, tuple[str, Tensor]] = {}
        self._read: set[str] = set()

    @property
    def scaling(self) -> float:
        self._read.add("scaling")
        return self._scaling

    def __getitem__(self, label: str) -> Tensor:
        tensor = self._view[label]
        self._given[id(tensor)] = label, tensor
        return tensor

    def __getattr__(self, name: str) -> Any:
        if name in self._view.labels:
            return self[name]
        self._read.add(name)
        return getattr(self._view, name)

    def found(self, A: Tensor, B: Tensor, scale: object) -> Stored | None:
        """What the answer is, if it is tensors of slots."""
        first, second = self._given.get(id(A)), self._given.get(id(B))
        if first is None or second is None or not isinstance(scale, (int, float)):
            return None
        is_scaling = scale is self._scaling
        settled = {"layer", "scaling"} if is_scaling else {"layer"}
        return Stored(first[0], second[0], scale, is_scaling, len(self._given) == 2 and self._read <= settled)


def stored_factors(part: Part, view: LayerView) -> Stored | None:
    """The slots that are the factors of an adapter's thin update, untouched; None if it computes any of them, or if its scale is
    a tensor. `view` shows the adapter, perhaps over other tensors. The class must give `thin`."""
    noting = _Noting(view)
    A, B, scale = part.lowering("thin")(noting)
    return noting.found(A, B, scale)
