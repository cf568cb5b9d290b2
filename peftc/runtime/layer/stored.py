"""Whether the factors of a thin update are tensors as they are stored, and which: found by asking the mathematics once, of a view
that notes what is read.

What then says all of an update are two tensors and a number: nothing has to be asked again at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
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


#: where A is looked up, and where B is; their dtype, for which this holds; the scale where it is not the layer's scaling
Places = tuple[dict[str, Any], str, dict[str, Any], str, torch.dtype, float | None]


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


def places_of(part: Part) -> Places | None:
    """Where the factors are, while they are matrices as they are stored, of one dtype, and nothing else decides; else None."""
    view = part.view
    found = stored_factors(part, view)
    if found is None or not found.is_settled:
        return None
    (first, a), (second, b) = view.place(found.first), view.place(found.second)
    A, B = first.get(a), second.get(b)
    if A is None or B is None or A.dtype is not B.dtype or A.dim() != 2 or B.dim() != 2:
        return None
    return first, a, second, b, A.dtype, None if found.is_scaling else float(found.scale)


def reader_of(part: Part) -> Callable[[], tuple[Tensor, Tensor, float]]:
    """What gives the factors and the scale as they are now: looked up where they are stored as they are, else by the method."""
    thin, view = part.lowering("thin"), part.view
    if not view.is_live:
        return partial(thin, view)
    owner, adapter = vars(view.owner), view.adapter
    is_asked, places = False, None

    def read() -> Any:
        nonlocal is_asked, places
        if torch.compiler.is_compiling():
            return thin(view)
        if not is_asked and not view.training:  # else the method may draw, once more than it should
            is_asked, places = True, places_of(part)
        if places is None:
            return thin(view)
        first, a, second, b, dtype, scale = places
        A, B = first.get(a), second.get(b)
        if A is None or B is None or A.is_meta or B.is_meta:
            return thin(view)
        if A.dtype is not dtype or B.dtype is not dtype:
            is_asked = False
            return thin(view)
        return A, B, owner["scaling"][adapter] if scale is None else scale

    return read
