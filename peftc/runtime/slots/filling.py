"""What slots begin with: values of a checkpoint, those that a method derives, and those that it starts with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from peftc import rules
from peftc.compiler.plan.sites import MapSite, ModuleSite
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import LayerFacts
from peftc.tuner.slots import Slot, labelled


def torch_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def half_of(layer: LayerFacts) -> torch.dtype | None:
    """The dtype of a layer in half precision; None for others."""
    dtype = next((tensor.dtype for tensor in layer.params.values()), "")
    return torch_dtype(dtype) if dtype in ("float16", "bfloat16") else None


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


class Storage(NamedTuple):
    """Slots by label, and the dtype of each."""

    slots: Mapping[str, Slot]
    dtypes: Mapping[str, torch.dtype]


def storage_of(slots: tuple[Slot, ...], usual: str) -> Storage:
    """The storage of a site's slots, those that do not say otherwise of the usual dtype."""
    named = labelled(slots)
    return Storage(named, {label: torch_dtype(slot.dtype or usual) for label, slot in named.items()})


def filled(
    site: MapSite | ModuleSite,
    adapter: str,
    device: torch.device,
    source: Callable[[str], Tensor | None] | None,
    init: Callable[[dict[str, Tensor]], object],
    shared: Mapping[str, Tensor] = MappingProxyType({}),
    derive: Callable[[dict[str, Slot]], Mapping[str, Tensor]] | None = None,
    storage: Storage | None = None,
) -> dict[str, Tensor]:
    """Tensors for a site's slots, by label: `shared` ones, from `source` by their disk keys, the rest as the method derives
    or starts them. Raises `PeftcError` for derived values of another shape than declared."""
    slots, dtypes = storage or storage_of(site.slots, site.dtype)
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


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory: the method's `init` or the checkpoint fills it."""
    return torch.empty(shape, dtype=dtype, device=device)
