"""Wrappers round whole modules, for every method that acts so: one for a module, shared by the adapters of a method there.

It stands in the model's place only while it has something to show there: tensors that go by their adapter's name, or an
active adapter. What is kept aside is no part of the model, so that its names are the active adapter's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftc.compiler.plan.sites import ModuleSite
from peftc.config.base import PeftConfig
from peftc.registry.boundary import guarded
from peftc.runtime.around.acting import OneActs
from peftc.runtime.bases.places import device_of, entire, hand_over
from peftc.runtime.journal import keep, keep_entries, keep_entry, keep_memory
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.slots.containers import SlotModule, drop, find, put
from peftc.runtime.slots.filling import INIT, filled
from peftc.tuner.method import TunerMethod
from peftc.tuner.modules import ModuleTuner
from peftc.tuner.slots import Container, Slot, labelled
from peftc.tuner.views import no_slot

#: Where pickles look the classes of wrappers up.
_HOME = "peftc.runtime.applying.classes"

#: a device, and a dtype if there is any floating-point tensor
Placed = tuple[torch.device, torch.dtype | None]

#: By public name and what they have of the record: a method that is registered anew gets others.
_classes: dict[tuple[object, ...], type[ModuleWrapper]] = {}


class ModuleWrapper(OneActs):
    """A module with adapters around it, at most one of which acts. Final but for the empty subclass of each method."""

    def __init__(self, module: nn.Module, site: ModuleSite, parent: nn.Module) -> None:
        """`parent` has the module as its child under the last part of the site's path; it stays there for now."""
        super().__init__()
        self.add_module(site.inner, module)
        self._inner = site.inner
        self._place = (parent, site.path.rpartition(".")[2])  # in a tuple, which torch does not take for a child
        self._sites: dict[str, tuple[ModuleSite, ModuleTuner[Any]]] = {}
        self._shelves: dict[str, Shelf] = {}
        self._is_in = False

    @property
    def wrapped(self) -> nn.Module:
        """The module inside."""
        module = self._modules[self._inner]
        assert module is not None
        return module

    # adapters -----------------------------------------------------------------------------------------------------

    def add(self, adapter: str, site: ModuleSite, tuner: ModuleTuner[Any], source: Source | None = None) -> None:
        """Give the module an adapter: slots from `source` where it has them, else initialised by the method.

        To be called under `no_grad`. The adapter does not act yet.
        """
        init = guarded(tuner.init, str(site.config.peft_type), site.path)
        made = filled(site, adapter, self._device(), source, lambda fresh: init(site.config, fresh, INIT))
        shelf = Shelf(self._placed())
        for label, slot in labelled(site.slots).items():
            parameter = nn.Parameter(made[label], requires_grad=False)
            if slot.named:
                put(self, slot, adapter, parameter)
            else:
                _lay(shelf, slot, parameter)
        keep_entry(self._sites, adapter)
        keep_entry(self._shelves, adapter)
        self._sites[adapter] = (site, tuner)
        self._shelves[adapter] = shelf
        self._settle()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors."""
        if adapter_name not in self._sites:
            return
        if self._active == adapter_name:
            self.activate(())
        keep_entries(self._sites, self._shelves)
        site, _ = self._sites.pop(adapter_name)
        self._shelves.pop(adapter_name)
        for slot in site.slots:
            if slot.named:
                drop(self, slot, adapter_name)
        self._settle()

    def parameters_of(self, adapter: str) -> Iterator[tuple[bool, nn.Parameter]]:
        """The adapter's tensors, in or out of the model, each with whether its slot is trainable."""
        if adapter in self._sites:
            for slot in self._sites[adapter][0].slots:
                container, key = self.where(adapter, slot)
                yield slot.trainable, container[key]

    def where(self, adapter: str, slot: Slot) -> tuple[dict[str, Any], str]:
        """Where a tensor is looked up. Raises `KeyError` if the adapter is not here."""
        if slot.named:
            return find(self, slot, adapter)
        owner = self if adapter == self._active else self._shelves[adapter]
        if slot.container is Container.PARAMETER:
            return owner._parameters, slot.name
        holder = owner._modules[slot.name]
        assert holder is not None
        return holder._parameters, slot.tail

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._sites)

    def site(self, adapter: str) -> ModuleSite:
        """The plan's site of an adapter. Raises `KeyError`."""
        return self._sites[adapter][0]

    # activation ---------------------------------------------------------------------------------------------------

    def activate(self, names: Sequence[str]) -> None:
        """Let the one of these adapters act that is here, if any; what requires gradients stays as it is."""
        keep(self)
        before = self._active
        self._active = next((name for name in names if name in self._sites), None)
        if before is not None and before != self._active:
            self._move(before, self, self._shelves[before])
            self._shelves[before].placed = self._placed()
        if self._active is not None and before != self._active:
            shelf = self._shelves[self._active]
            shelf.follow(self._placed())
            self._move(self._active, shelf, self)
        self._settle()

    def _move(self, adapter: str, origin: nn.Module, target: nn.Module) -> None:
        """Hand over an adapter's tensors that go without its name."""
        site, _ = self._sites[adapter]
        keep_entries(origin._parameters, target._parameters, origin._modules, target._modules)
        for slot in site.slots:
            if slot.name in origin._parameters and not slot.named:
                parameter = origin._parameters[slot.name]
                assert parameter is not None
                held = entire(origin, {slot.name: parameter})[slot.name].detach() if parameter.is_meta else None
                del origin._parameters[slot.name]
                hand_over(target, slot.name, parameter, held)
            elif slot.name in origin._modules and not slot.named:  # with all tensors of that name, whatever their tail
                target._modules[slot.name] = origin._modules.pop(slot.name)

    def _settle(self) -> None:
        """Stand in the module's place, or leave it. What others have put there meanwhile stays: inside, or around."""
        parent, name = self._place
        shows = self._active is not None or any(slot.named for site, _ in self._sites.values() for slot in site.slots)
        there = parent._modules[name]
        keep(self)
        keep_entry(self._modules, self._inner)
        keep_entry(parent._modules, name)
        if shows and not self._is_in and there is not None:
            self.training = there.training
            self._modules[self._inner] = there
            parent._modules[name] = self
            self._is_in = True
        elif not shows and there is self:
            parent._modules[name] = self.wrapped
            self._is_in = False

    # the module ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active adapter makes of the call, or the module's own answer.

        What is raised in there is left as it is: the wrapped module's own complaints are more frequent than the method's.
        """
        if self._active is None or self._disabled:
            return self.wrapped(*args, **kwargs)
        _, tuner = self._sites[self._active]
        return tuner.forward(View(self, self._active), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the model reads off its module come from that."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == self._inner:
                raise
            return getattr(self.wrapped, name)

    def _device(self) -> torch.device:
        return device_of(self.wrapped)

    def _placed(self) -> Placed:
        """Where the wrapped module computes, and in what dtype."""
        found = next((p for p in self.wrapped.parameters() if p.is_floating_point()), None)
        return self._device(), None if found is None else found.dtype

    def take_out(self) -> None:
        """Put the module back, whatever is here."""
        parent, name = self._place
        keep(self)
        keep_entry(parent._modules, name)
        parent._modules[name] = self.wrapped
        self._is_in = False

    def extra_repr(self) -> str:
        return f"adapters={list(self._sites)}, active={self.active_adapters}"


class Shelf(nn.Module):
    """Tensors of one adapter that are not in the model for now. `placed` is where that was when they left it."""

    def __init__(self, placed: Placed) -> None:
        super().__init__()
        self.placed = placed

    def follow(self, placed: Placed) -> None:
        """Go where the model has gone meanwhile, and be cast as it was."""
        device, dtype = placed
        moved = any(p.device != device and not p.is_meta for p in self.parameters())
        if moved or dtype != self.placed[1]:
            for parameter in self.parameters():
                keep_memory(parameter)
            self.to(device=device if moved else None, dtype=dtype if dtype != self.placed[1] else None)


class View:
    """One adapter around one module, as the method's mathematics sees it (`peftc.tuner.modules.ModuleView`).

    Made for a call: it looks tensors up where they are then.
    """

    def __init__(self, wrapper: ModuleWrapper, adapter: str) -> None:
        self._wrapper = wrapper
        self._slots = labelled(wrapper.site(adapter).slots)
        self.adapter = adapter

    @property
    def config(self) -> PeftConfig:
        return self._wrapper.site(self.adapter).config

    @property
    def module(self) -> nn.Module:
        return self._wrapper.wrapped

    def __getitem__(self, label: str) -> Tensor:
        tensor: Tensor = getattr(self, label)
        return tensor

    def __getattr__(self, name: str) -> Tensor:
        slots: Mapping[str, Slot] = self.__dict__["_slots"]
        if name not in slots:
            raise no_slot(name, slots)
        container, key = self._wrapper.where(self.adapter, slots[name])
        tensor: Tensor = container[key]
        return entire(self._wrapper, {name: tensor})[name] if tensor.is_meta else tensor


def wrapper_class(method: TunerMethod) -> type[ModuleWrapper]:
    """The class of a method's wrappers, e.g. for `isinstance(module, ...)`."""
    name = method.layer_class
    key = (name, method.config, method.layer_names, method.summary)
    if key not in _classes:
        names = {"adapter_layer_names": method.layer_names, "__module__": _HOME, "__doc__": method.summary}
        _classes[key] = type(name, (ModuleWrapper,), names)
    return _classes[key]


def _lay(shelf: nn.Module, slot: Slot, parameter: nn.Parameter) -> None:
    """Keep a tensor of a slot that goes without the adapter's name."""
    if slot.container is Container.PARAMETER:
        shelf._parameters[slot.name] = parameter
    elif slot.name in shelf._modules:
        shelf._modules[slot.name]._parameters[slot.tail] = parameter  # type: ignore[union-attr]  # just put there
    else:
        shelf._modules[slot.name] = SlotModule.holding(**{slot.tail: parameter})
