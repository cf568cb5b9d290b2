"""Where slots live: containers with the ecosystem's parameter names, and views that look tensors up at each use.

A view holds containers and keys, never tensors: assign-loading, functional calls, sharding and casts swap the parameters
underneath, and a cached tensor would be stale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.sites import MapSite, ModuleSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import LayerFacts
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.call import Call
from peftc.runtime.journal import keep_entries, keep_entry
from peftc.runtime.slots.buffers import BufferDict
from peftc.tuner.experts import one_of
from peftc.tuner.slots import Container, Slot, labelled


def torch_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _product(tensor: Tensor, x: Tensor) -> Tensor:
    """What a call from outside gets. How a convolution steps, the layer knows that calls."""
    if tensor.dim() != 2:
        what = f"A slot of shape {tuple(tensor.shape)} was called by another than its layer"
        fix = "Call the layer; gradients of single samples come from `torch.func`, or leave convolutions out."
        raise PeftcError(rules.SLOT_CALLED(what, fix=fix))
    return F.linear(x, tensor)


def half_of(layer: LayerFacts) -> torch.dtype | None:
    """The dtype of a layer in half precision; None for others."""
    dtype = next((tensor.dtype for tensor in layer.params.values()), "")
    return torch_dtype(dtype) if dtype in ("float16", "bfloat16") else None


class SlotModule(nn.Module):
    """Holds one adapter's tensor of a slot under the slot's tail: `lora_A.default` with its `weight`.

    It is read, not called, unless somebody is to see its calls (`peftc.runtime.called`).
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


class Initializer:
    """`SlotInit` on tensors. Runs under `no_grad`; tensors without data are left alone.

    What is drawn beside a base layer in half precision is `rounded` to it, as the reference's parameters have once been.
    """

    __slots__ = ("_opened", "_rounded")

    def __init__(self, opened: Callable[[], Mapping[str, Tensor]] = dict, rounded: torch.dtype | None = None) -> None:
        self._opened = opened
        self._rounded = rounded

    @property
    def base(self) -> Mapping[str, Tensor]:
        return self._opened()

    def of_expert(self, name: str, index: int) -> Initializer:
        return Initializer(lambda: {"weight": self._opened()[name][index]}, self._rounded)

    def zeros(self, tensor: Tensor) -> None:
        tensor.zero_()

    def ones(self, tensor: Tensor) -> None:
        tensor.fill_(1.0)

    def fill(self, tensor: Tensor, value: float) -> None:
        own = torch.tensor(value).to(self._rounded or torch.get_default_dtype())
        tensor.fill_(own.item())

    def normal(self, tensor: Tensor, std: float = 1.0, mean: float = 0.0) -> None:
        drawn = _drawn_for(tensor)
        if drawn is not None:
            self._keep(tensor, drawn.normal_(mean, std))

    def uniform(self, tensor: Tensor, bound: float) -> None:
        drawn = _drawn_for(tensor)
        if drawn is not None:
            self._keep(tensor, drawn.uniform_(-bound, bound))

    def kaiming_uniform(self, tensor: Tensor, a: float = 5**0.5) -> None:
        """He et al. 2015 with the fan of dimension 1 and up, as torch's own initialiser."""
        fan = max(1, tensor.numel() // tensor.shape[0])
        self.uniform(tensor, math.sqrt(3.0) * (math.sqrt(2.0 / (1.0 + a * a)) / math.sqrt(fan)))  # in torch's order

    def skip_normal(self, tensor: Tensor) -> None:
        drawn = _drawn_for(tensor)
        if drawn is not None:
            drawn.normal_()

    def skip_uniform(self, tensor: Tensor) -> None:
        drawn = _drawn_for(tensor)
        if drawn is not None:
            drawn.uniform_()

    def _keep(self, tensor: Tensor, drawn: Tensor) -> None:
        if self._rounded is not None:
            drawn = drawn.to(self._rounded)
        if drawn is not tensor:
            tensor.copy_(drawn)


def _drawn_for(tensor: Tensor) -> Tensor | None:
    """Where the numbers for a tensor are drawn: in itself, if it is as all are drawn, else beside it; None if it has no data."""
    if tensor.is_cpu and tensor.dtype is torch.get_default_dtype() and tensor.is_contiguous():
        return tensor
    return None if tensor.is_meta else torch.empty(tensor.shape, device="cpu")


INIT = Initializer()


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
    holder = holder_of(owner, slot, adapter)
    if slot.container is Container.MODULE:
        return _tensors(holder, slot), slot.tail
    tensors = _tensors(holder, slot)
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


def filled(
    site: MapSite | ModuleSite,
    adapter: str,
    device: torch.device,
    source: Callable[[str], Tensor | None] | None,
    init: Callable[[dict[str, Tensor]], object],
    shared: Mapping[str, Tensor] = MappingProxyType({}),
    derive: Callable[[dict[str, Slot]], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Tensors for a site's slots, by label: `shared` ones, from `source` by their disk keys, the rest as the method derives
    or starts them. Raises `PeftcError` for derived values of another shape than declared."""
    slots = labelled(site.slots)
    dtypes = {label: torch_dtype(slot.dtype or site.dtype) for label, slot in slots.items()}
    made: dict[str, Tensor] = dict(shared)
    for label, slot in slots.items():
        if label in made:
            continue
        found = None if source is None else source(site.key(slot, adapter).disk())
        if found is not None:
            made[label] = found.to(device=found.device if found.is_meta else device, dtype=dtypes[label])
        elif slot.value is not None:
            made[label] = torch.full(slot.shape, slot.value, dtype=dtypes[label], device=device)
    lacking = [slot for label, slot in slots.items() if label not in made]
    if derive is not None and any(slot.derived for slot in lacking):
        made = {**derived(site, device, derive), **made}
    if any(not slot.derived for slot in lacking):  # the method fills a whole set, of which the rest is taken
        fresh = {
            label: allocate(slot.shape, dtypes[label], device)
            for label, slot in slots.items()
            if label not in shared and not slot.derived
        }
        init(fresh)
        made = {**fresh, **made}
    return made


class Owner(Protocol):
    """What a view asks of its layer."""

    training: bool
    scaling: dict[str, Any]

    def pristine(self) -> Mapping[str, Tensor]: ...

    def get_base_layer(self) -> nn.Module: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def call(self) -> Call | None: ...


def derived(
    site: MapSite | ModuleSite, device: torch.device, derive: Callable[[dict[str, Slot]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """A site's derived tensors, by label. They have values even where a layer has no memory yet.

    Raises `PeftcError` for values of another shape than declared.
    """
    slots = {label: slot for label, slot in labelled(site.slots).items() if slot.derived}
    values = derive(slots)
    wrong = [name for name, slot in slots.items() if name not in values or tuple(values[name].shape) != slot.shape]
    if wrong:
        what = f"`derive` of {site.config.peft_type} gives nothing of the declared shape for `{wrong[0]}`"
        raise PeftcError(rules.PLUGIN_INVALID(what, fix="Correct the plugin's `derive`.", where=site.path))
    device = torch.device("cpu") if device.type == "meta" else device
    return {
        name: values[name].detach().to(device=device, dtype=torch_dtype(slot.dtype or site.dtype))
        for name, slot in slots.items()
    }


class LayerView:
    """One adapter on one layer, as the method's mathematics sees it (`peftc.tuner.views.View`)."""

    __slots__ = ("_holders", "_mode", "_owner", "_scaling", "_slots", "adapter", "config", "layer")

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
        raise AttributeError(f"no slot `{name}`; there are {sorted(self._slots)}")

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


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory: the method's `init` or the checkpoint fills it."""
    return torch.empty(shape, dtype=dtype, device=device)
