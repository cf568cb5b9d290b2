"""Where slots live: containers with the ecosystem's parameter names, and views that look tensors up at each use.

A view holds containers and keys, never tensors: assign-loading, functional calls, sharding and casts swap the parameters
underneath, and a cached tensor would be stale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.journal import keep_entries, keep_entry
from peftc.runtime.slots.buffers import BufferDict
from peftc.tuner.slots import Container, Slot


def _product(tensor: Tensor, x: Tensor) -> Tensor:
    """What a call from outside gets. How a convolution steps, the layer knows that calls."""
    if tensor.dim() != 2:
        what = f"A slot of shape {tuple(tensor.shape)} was called by another than its layer"
        fix = "Call the layer; gradients of single samples come from `torch.func`, or leave convolutions out."
        raise PeftcError(rules.SLOT_CALLED(what, fix=fix))
    return F.linear(x, tensor)


def place_in(root: nn.Module, path: Sequence[str]) -> tuple[nn.Module, str]:
    """The module below `root` that holds the tensor at a path, and its name there."""
    *names, last = path
    for name in names:
        child = root._modules[name]
        assert child is not None
        root = child
    return root, last


class SlotModule(nn.Module):
    """Holds one adapter's tensor of a slot under the slot's tail: `lora_A.default` with its `weight`.

    It is read, not called, unless somebody is to see its calls (`peftc.runtime.layer.called`).
    """

    #: names of its tensors, where others may have taken them out of torch's dictionaries
    tails: tuple[str, ...] = ()

    @classmethod
    def holding(cls, **parameters: nn.Parameter) -> SlotModule:
        """One with these tensors. Made from a template: `nn.Module.__init__` would be most of the cost of an adapter."""
        module = cls.__new__(cls)
        state = module.__dict__
        state.update(_PLAIN)
        for key, make in _FRESH:
            state[key] = make()
        state["_parameters"].update(parameters)
        return module

    def forward(self, x: Tensor | None = None, *, by: Callable[[Tensor, Tensor], Tensor] = _product) -> Any:
        """What it makes of an input: of its one tensor and that, `by` says what. Without an input copies of its tensors, one
        alone or several in their order: what it holds may be there only during the call."""
        tensors = [found for name in self.tails if (found := tensor_of(self, name)) is not None]
        if x is not None:
            (tensor,) = tensors
            return by(tensor, x.to(tensor.dtype) if x.is_floating_point() else x)
        copies = tuple(tensor.clone() for tensor in tensors)
        return copies[0] if len(copies) == 1 else copies

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(p.shape)}" for name, p in self._parameters.items() if p is not None)


_TEMPLATE = SlotModule().__dict__
_FRESH = tuple((key, type(value)) for key, value in _TEMPLATE.items() if isinstance(value, (dict, set)))
_PLAIN = {key: value for key, value in _TEMPLATE.items() if not isinstance(value, (dict, set))}


#: Where a container that all layers hold counts, by adapter, the layers that have its tensor.
HOLDERS = "_holders"


def container_for(slot: Slot) -> nn.Module:
    """An empty dict of adapters for a slot."""
    if slot.container is Container.MODULE:
        return nn.ModuleDict()
    return BufferDict() if slot.derived else nn.ParameterDict()


def container_of(owner: nn.Module, slot: Slot) -> nn.Module:
    """The dict of adapters for a slot on a layer, made on first use."""
    container = owner._modules.get(slot.name)
    if container is None:
        keep_entry(owner._modules, slot.name)
        container = owner._modules[slot.name] = container_for(slot)
    return container


def put(owner: nn.Module, slot: Slot, adapter: str, tensor: Tensor) -> tuple[dict[str, Any], str]:
    """Store a tensor, a parameter unless the slot is derived; returns the dict and key where it can be looked up."""
    container = container_of(owner, slot)
    if slot.container is Container.PARAMETER:
        if isinstance(container, nn.ParameterDict):
            keep_entry(container._keys, adapter)
            keep_entry(container._parameters, adapter)
            container[adapter] = tensor
        else:
            _put_buffer(container, adapter, tensor, slot.saved)
        return _tensors(container, slot), adapter
    holder = container._modules.get(adapter)
    if holder is None and not slot.derived:
        keep_entry(container._modules, adapter)
        made = container._modules[adapter] = SlotModule.holding(**{slot.tail: cast(nn.Parameter, tensor)})
        made.__dict__["tails"] = (slot.tail,)
        return made._parameters, slot.tail
    if holder is None:
        keep_entry(container._modules, adapter)
        holder = container._modules[adapter] = SlotModule.holding()
    keep_entry(holder.__dict__, "tails")
    holder.__dict__["tails"] = tuple(dict.fromkeys((*holder.__dict__.get("tails", ()), slot.tail)))
    if slot.derived:
        _put_buffer(holder, slot.tail, tensor, slot.saved)
    else:
        keep_entry(holder._parameters, slot.tail)
        holder._parameters[slot.tail] = cast(nn.Parameter, tensor)
    return _tensors(holder, slot), slot.tail


def _put_buffer(holder: nn.Module, name: str, tensor: Tensor, saved: bool) -> None:
    keep_entry(holder._buffers, name)
    keep_entries(holder._non_persistent_buffers_set)
    holder.register_buffer(name, tensor, persistent=saved)


def _tensors(holder: nn.Module, slot: Slot) -> dict[str, Any]:
    return holder._buffers if slot.derived else holder._parameters


def find(owner: nn.Module, slot: Slot, adapter: str) -> tuple[dict[str, Any], str]:
    """Where a stored tensor is looked up. Raises `KeyError` if the adapter has none."""
    return find_in(holder_of(owner, slot, adapter), slot, adapter)


def find_in(holder: nn.Module, slot: Slot, adapter: str) -> tuple[dict[str, Any], str]:
    """The same in the module that has it. Raises `KeyError`."""
    tensors = holder._buffers if slot.derived else holder._parameters
    if slot.container is Container.MODULE:
        return tensors, slot.tail
    if adapter not in tensors:
        raise KeyError(adapter)
    return tensors, adapter


def holder_of(owner: nn.Module, slot: Slot, adapter: str) -> nn.Module:
    """The module that has a stored tensor; wrappers that others have put round it are seen through."""
    container = owner._modules[slot.name]
    assert container is not None
    if slot.container is Container.PARAMETER:
        return container
    holder = container._modules[adapter]
    assert holder is not None
    while not isinstance(holder, SlotModule):
        holder = next(iter(holder._modules.values()))
        assert holder is not None
    return holder


def drop(owner: nn.Module, slot: Slot, adapter: str) -> None:
    """Remove an adapter's tensor; a container that becomes empty stays, as in the reference."""
    container = owner._modules.get(slot.name)
    if container is None:
        return
    if slot.home == "":
        holders: Counter[str] = container.__dict__[HOLDERS]
        keep_entry(holders, adapter)
        holders[adapter] -= 1
        if holders[adapter] > 0:  # other layers hold it as well
            return
    if slot.container is Container.MODULE:
        keep_entries(container._modules)
        container._modules.pop(adapter, None)
    elif isinstance(container, nn.ParameterDict):
        if adapter in container:
            keep_entries(container._keys, container._parameters)
            del container[adapter]
    else:
        keep_entries(container._buffers, container._non_persistent_buffers_set)
        container._buffers.pop(adapter, None)
        container._non_persistent_buffers_set.discard(adapter)
