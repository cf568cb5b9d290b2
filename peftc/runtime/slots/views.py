"""Views: one adapter on one layer, as the mathematics of its method sees it.

A view holds containers and keys, never tensors: assign-loading, functional calls, sharding and casts swap the parameters
underneath, and a cached tensor would be stale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, Protocol
from weakref import ref as weakref

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import LayerFacts
from peftc.ops.lowrank import is_traced
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.call import Call
from peftc.tuner.experts import one_of
from peftc.tuner.views import no_slot


class Seeing(Protocol):
    """What a layer has of an adapter."""

    view: LayerView


class Holding(Protocol):
    """Adapters that have a base weight of their own."""

    @property
    def held(self) -> Mapping[str, object]: ...


class Owner(Protocol):
    """What a view asks of its layer."""

    training: bool
    scaling: dict[str, Any]

    def pristine(self) -> Mapping[str, Tensor]: ...

    def get_base_layer(self) -> nn.Module: ...

    def part(self, adapter: str) -> Seeing: ...

    @property
    def rebased(self) -> Holding | None: ...

    @property
    def adapters(self) -> tuple[str, ...]: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def call(self) -> Call | None: ...


class _This:
    """One tensor, equal to itself alone: by its object while that lives, not by what is in it."""

    __slots__ = ("_at",)

    def __init__(self, at: weakref[Tensor]) -> None:
        self._at = at

    def __eq__(self, other: object) -> bool:
        own = self._at()
        return own is not None and isinstance(other, _This) and other._at() is own


class LayerView:
    """One adapter on one layer, as the method's mathematics sees it (`peftc.tuner.views.View`)."""

    __slots__ = ("_holders", "_known", "_mode", "_owner", "_scaling", "_slots", "adapter", "config", "layer", "noted")

    def __init__(
        self,
        adapter: str,
        site: MapSite,
        slots: Mapping[str, tuple[dict[str, Any], str]],
        holders: Mapping[str, nn.Module],
        owner: Owner,
    ) -> None:
        self.adapter = adapter
        self.config: PeftConfig = site.config
        self.layer: LayerFacts = site.layer
        self._slots = slots
        self._holders = holders
        self._scaling: float | None = None
        self._owner = owner
        self._mode: bool | None = None
        self._known: dict[str, tuple[tuple[object, ...], Tensor]] = {}
        self.noted: dict[str, Any] = {}

    def fixed(self, training: bool) -> LayerView:
        """The same in training or not, whatever the layer's mode is or becomes, and with the scaling of now."""
        view = self._copy()
        view._mode = training
        view._scaling = self.scaling
        return view

    def over(self, tensors: dict[str, Tensor]) -> LayerView:
        """The same with other tensors, by slot name."""
        view = self._copy()
        view._slots = {name: (tensors, name) for name in tensors}
        view._holders = {}
        view._known = {}
        return view

    def of_expert(self, tensors: dict[str, Tensor]) -> LayerView:
        """That of one expert, with its tensors, as of a linear layer."""
        view = self.over(tensors)
        view.layer = one_of(self.layer)
        return view

    def _copy(self) -> LayerView:
        view = object.__new__(type(self))
        for name in LayerView.__slots__:
            setattr(view, name, getattr(self, name))
        return view

    @property
    def labels(self) -> Collection[str]:
        """The slots, by label."""
        return self._slots.keys()

    @property
    def is_live(self) -> bool:
        """Whether it shows what the layer has now: its own tensors, scaling and mode."""
        return bool(self._holders) and self._mode is None and self._scaling is None

    def place(self, label: str) -> tuple[dict[str, Any], str]:
        """Where a slot's tensor is looked up at each use. Raises `KeyError`."""
        return self._slots[label]

    @property
    def owner(self) -> Owner:
        """The layer."""
        return self._owner

    def tensors(self) -> dict[str, Tensor]:
        """The slots' tensors as they are now, by name."""
        return {name: self[name] for name in self._slots}

    @property
    def training(self) -> bool:
        return self._owner.training if self._mode is None else self._mode

    @property
    def base(self) -> Mapping[str, Tensor]:
        return self._owner.pristine()

    @property
    def scaling(self) -> float:
        return self._owner.scaling[self.adapter] if self._scaling is None else self._scaling

    def __getitem__(self, label: str) -> Tensor:
        if label not in self._slots:
            raise no_slot(label, self._slots)
        container, key = self._slots[label]
        tensor: Tensor | None = container.get(key)
        return self._elsewhere(label) if tensor is None or tensor.is_meta else tensor

    def _elsewhere(self, label: str) -> Tensor:
        """A tensor that is not where it was put: it is computed from others, or has to be brought."""
        container, key = self._slots[label]
        holder = self._holders.get(label)
        tensor = container[key] if holder is None else tensor_of(holder, key)
        if tensor is None:
            what = f"`{label}` of `{self.adapter}` is no longer where it was put"
            fix = "Its module was changed by another library: load the adapter anew, and let that library do its work then."
            raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix=fix))
        return tensor

    def down(self, A: Tensor, x: Tensor) -> Tensor:
        return self._owner.backend.down(self._owner.get_base_layer(), A, x)

    def up(self, B: Tensor, h: Tensor) -> Tensor:
        return self._owner.backend.up(self._owner.get_base_layer(), B, h)

    @property
    def siblings(self) -> Mapping[str, LayerView]:
        owner = self._owner
        found = {name: owner.part(name).view for name in owner.adapters if name != self.adapter}
        apart = [] if owner.rebased is None else [name for name in found if name in owner.rebased.held]
        if apart:
            what = (
                f"`{apart[0]}` has a base weight of its own, beside which alone its update means what it was trained to"
            )
            fix = "Save it with `path_initial_model_for_weight_conversion=True`, and load that in its place."
            raise PeftcError(rules.CANNOT_GATE(what, fix=fix))
        return found

    def kept(
        self,
        name: str,
        make: Callable[[], Tensor],
        slots: Sequence[str] = (),
        base: Sequence[str] = (),
        of: Sequence[str] = (),
    ) -> Tensor:
        siblings = self.siblings if of else {}
        key = None if is_traced() else self._state(slots, base, [siblings[name] for name in of] or [self])
        if key is None:
            self._known.pop(name, None)
            with torch.no_grad():
                return make()
        known = self._known.get(name)
        if known is None or known[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may serve a training later
                known = self._known[name] = (key, make())
        return known[1]

    def _state(
        self, slots: Sequence[str], base: Sequence[str], views: Sequence[LayerView]
    ) -> tuple[object, ...] | None:
        """What tells these tensors, as they are now, from what they were; None where nothing can be kept."""
        parameters = self._owner.get_base_layer()._parameters
        places = [view._slots[label] for view in views for label in slots]
        stored = [container.get(key) for container, key in places]
        stored += [parameters.get(each) for each in base]
        found: list[object] = [view.scaling for view in views] if slots else []
        if any(isinstance(scaling, Tensor) for scaling in found):
            return None
        for tensor in stored:
            if type(tensor) is not nn.Parameter or tensor.is_meta or tensor.is_inference():
                return None
            if tensor.requires_grad and self.training:
                return None
            found += [_This(weakref(tensor)), tensor.data_ptr(), tensor._version, tensor.dtype]
        return tuple(found)

    def of_rows(self, name: str, x: Tensor, default: int | None = None) -> Tensor:
        """What the open call gives for each row of `x`, by keyword; without it, the default for every row."""
        call = self._owner.call
        given = None if call is None else call.value(name, x.shape[0], x.device)
        if given is not None:
            return given
        if default is None:
            what = f"`{self.adapter}` reads `{name}`, which the call does not give"
            fix = f"Call the model with `{name}`, one value for each row."
            raise PeftcError(rules.ROW_VALUES(what, fix=fix))
        return torch.full((x.shape[0],), default, device=x.device)

    def __getattr__(self, name: str) -> Tensor:
        """Slots are properties of the class that `view_class` makes; here comes what is none."""
        raise no_slot(name, self._slots)

    def dtype(self) -> torch.dtype:
        """The dtype that the adapter computes in."""
        label, (container, key) = next(iter(self._slots.items()))
        tensor: Tensor | None = container.get(key)
        return (self._elsewhere(label) if tensor is None else tensor).dtype


@cache
def view_class(slots: tuple[str, ...]) -> type[LayerView]:
    """The class of views with these slots. Properties, because `__getattr__` would cost more than a small product."""

    def reader(slot: str) -> property:
        def read(view: LayerView) -> Tensor:
            container, key = view._slots[slot]
            try:
                tensor: Tensor = container[key]
            except KeyError:
                return view._elsewhere(slot)
            return view._elsewhere(slot) if tensor.is_meta else tensor

        return property(read)

    return type("LayerView", (LayerView,), {"__slots__": (), **{slot: reader(slot) for slot in slots}})
