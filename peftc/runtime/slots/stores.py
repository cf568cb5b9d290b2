"""Where tensors are kept that layers share: which object they are, which layers hold it, and where else it shows.

What all layers share is in one container that they all hold, so that casts and moves, which replace buffers, keep it one.
What some share is one parameter under several names, as torch's own tied weights are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peftc.compiler.plan.sites import MapSite
from peftc.runtime.journal import keep, keep_entries, keep_entry
from peftc.runtime.slots.containers import HOLDERS, container_for, put
from peftc.runtime.slots.kinds import Kind
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot


class Stores:
    """A model's containers of tensors that all layers share, by slot. Adapters come and go in them."""

    def __init__(self) -> None:
        self._containers: dict[str, nn.Module] = {}
        self._level: nn.Module | None = None

    def container(self, slot: Slot) -> nn.Module:
        """The one for a slot, made on first use."""
        if slot.name not in self._containers:
            keep_entry(self._containers, slot.name)
            made = self._containers[slot.name] = container_for(slot)
            made.__dict__[HOLDERS] = Counter()
        return self._containers[slot.name]

    def show_at(self, level: nn.Module) -> None:
        """Let the level above the model have them as well, under their names."""
        keep(self)
        self._level = level
        self.show()

    def show(self) -> None:
        """Let that level, if there is one, have those that are new."""
        if self._level is not None:
            keep_entries(self._level._modules)
            self._level._modules.update(self._containers)

    def prune(self) -> None:
        """Take out those without an adapter: what is left of one that could not be added."""
        self._remove([name for name, container in self._containers.items() if _is_empty(container)])

    def clear(self) -> None:
        """Take all out."""
        self._remove(list(self._containers))

    def _remove(self, names: Iterable[str]) -> None:
        keep_entries(self._containers)
        if self._level is not None:
            keep_entries(self._level._modules)
        for name in names:
            del self._containers[name]
            if self._level is not None:
                self._level._modules.pop(name, None)


def _is_empty(container: nn.Module) -> bool:
    return next(container.parameters(), next(container.buffers(), None)) is None


class Stock:
    """The shared tensors of one adapter while its layers are made."""

    def __init__(self, stores: Stores | None = None) -> None:
        self._stores = stores or Stores()
        self._tensors: dict[tuple[str, str, str | None], Tensor] = {}
        self._kinds: dict[tuple[int, int, str], Kind] = {}

    def kind(self, site: MapSite, tuner: MapTuner[Any]) -> Kind:
        """What the layers of a site's kind have in common, which share their slots, options and facts."""
        key = id(site.slots), id(tuner), site.dtype
        found = self._kinds.get(key)
        if found is None or found.site.config is not site.config or found.site.layer is not site.layer:
            found = self._kinds[key] = Kind.of(site, tuner)
        return found

    def found(self, slots: Mapping[str, Slot]) -> dict[str, Tensor]:
        """Of these slots, by label, the tensors that other layers have made."""
        if not self._tensors:
            return {}
        return {name: self._tensors[s.label] for name, s in slots.items() if s.label in self._tensors}

    def put(self, owner: nn.Module, slot: Slot, adapter: str, tensor: Tensor) -> None:
        """Store a slot's tensor on a layer, for others as well if it is shared."""
        if slot.home == "":
            keep_entry(owner._modules, slot.name)
            container = owner._modules[slot.name] = self._stores.container(slot)
            keep_entry(container.__dict__[HOLDERS], adapter)
            container.__dict__[HOLDERS][adapter] += 1
        if slot.home != "" or slot.label not in self._tensors:
            put(owner, slot, adapter, tensor)
        if slot.home is not None:
            self._tensors[slot.label] = tensor
