"""`TunerLayer`: the one wrapper round a base layer, for every method.

An instance covers one module and one method; adapters of that method share it. It owns forward, merge, unmerge and the
adapters' tensors; the mathematics is the method's. Live names are the ecosystem's: `base_layer`, `<slot>.<adapter>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.sites import MapSite
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import Kind
from peftc.host import tensor_parallel
from peftc.host.attention import PRIVATE
from peftc.registry.boundary import guarded
from peftc.runtime.bases import places
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.inputs import first_argument
from peftc.runtime.bases.table import BACKENDS, backend_of
from peftc.runtime.call import Call, Shared
from peftc.runtime.journal import keep, keep_entries, keep_entry, keep_trained, keep_values, note, whole
from peftc.runtime.layer.called import noticing
from peftc.runtime.layer.deletion import tell
from peftc.runtime.layer.dropouts import all_dropouts, drop_dropout, dropout_of
from peftc.runtime.layer.folding import opened
from peftc.runtime.layer.merging import Merging
from peftc.runtime.layer.parts import Part, Path, Under
from peftc.runtime.layer.reading import as_read
from peftc.runtime.layer.scaling import Scaling
from peftc.runtime.layer.starting import Beginning
from peftc.runtime.slots.containers import drop, find, find_in, holder_of
from peftc.runtime.slots.filling import derived, filled
from peftc.runtime.slots.stores import Stock
from peftc.runtime.slots.views import view_class
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot, labelled
from peftc.tuner.start import Chosen

#: finds a slot's tensor by its disk key, or says None: then the method initialises it
Source = Callable[[str], Tensor | None]


class BaseTunerLayer:
    """What `isinstance(module, BaseTunerLayer)` asks for in other libraries. Only `TunerLayer` derives from it."""


class TunerLayer(Merging, Scaling, BaseTunerLayer):
    """A base layer with adapters of one method. Final but for the empty subclass that each method's record gets.

    The base layer may itself be one, of another method: then the adapters of that come first.
    """

    #: slots that hold trainable tensors, and other attributes keyed by adapter; other libraries read them
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ("scaling",)
    #: what libraries that cast around layers set (`peftc.helpers.disable_input_dtype_casting`)
    cast_input_dtype_enabled: bool = True
    #: whether what is around the layer reads its parameters, and does not call it
    read_past: bool = False
    #: the parameter that is adapted, where it is a single one of the module's; that, or the place, tells sites at a path apart
    parameter: str = ""
    spot: str = ""

    #: what the container of dropouts is called in the model
    dropout_name: ClassVar[str] = "adapter_dropout"

    base_layer: nn.Module
    peft_type: str
    in_features: int
    out_features: int
    #: slots that a step of training stopped from training on, by adapter
    held: dict[str, set[str]]
    _kind: Kind
    _backend: Backend
    _first: str
    _path: Path
    _under: Under

    def __init__(self, base_layer: nn.Module, site: MapSite) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        self.__dict__.update(  # not one by one by setattr, in which torch looks for parameters and modules
            peft_type=str(site.config.peft_type),
            in_features=site.layer.in_features,
            out_features=site.layer.out_features,
            scaling={},
            merged_adapters=[],
            held={},
            parameter=site.parameter,
            spot=site.spot,
            _sites={},
            _parts={},
            _kind=site.layer.kind,
            _backend=backend_of(site.layer),
            _first=first_argument(type(self.get_base_layer()).forward),
            _active=(),
            _disabled=False,
            _shared=Shared(),
            _is_aside=False,
            _rebased=None,
            _found_at={},
            _folded_at={},
        )
        self._nest()
        self._choose_path()

    @property
    def room(self) -> nn.Module:
        """The module that has the slots."""
        return self

    # adapters -----------------------------------------------------------------------------------------------------

    def add(
        self,
        adapter: str,
        site: MapSite,
        tuner: MapTuner[Any],
        source: Source | None = None,
        stock: Stock | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        """Give the layer an adapter. To be called under `no_grad`.

        Slots come from `source` where it has them, else they are initialised or derived by the method, or as the start does
        that was `chosen`. `stock` has what layers of the adapter share.
        """
        stock = stock or Stock()
        kind = stock.kind(site, tuner)
        named = kind.storage.slots
        shared = stock.found(named)

        start = Beginning(site, tuner, kind, self, chosen, source)

        def derive(slots: Mapping[str, Slot]) -> Mapping[str, Tensor]:
            return guarded(tuner.derive, self.peft_type, site.path)(site.config, site.layer, slots)

        made = filled(site, adapter, self.device, source, start, shared, derive, kind.storage)
        for label, slot in named.items():
            value = made[label]
            as_it_is = slot.derived or label in shared
            stock.put(self.room, slot, adapter, value if as_it_is else nn.Parameter(value, requires_grad=False))
        own = dict.fromkeys(s.name for s in named.values() if s.trainable and s.name not in self.adapter_layer_names)
        if own:  # of a variant of the method
            keep_entry(self.__dict__, "adapter_layer_names")
            self.__dict__["adapter_layer_names"] = (*self.adapter_layer_names, *own)
        for known in (self.scaling, self._sites, self._parts):
            keep_entry(known, adapter)
        self.scaling[adapter] = kind.scaling
        self._sites[adapter] = (site, tuner)
        self._view(adapter, kind.dropout, named)
        self.hold(adapter, start.held(), site.path)
        if self._shared.by_rows:
            keep(self)
            self._choose_path()

    def derived(self, adapter: str, site: MapSite) -> Mapping[str, Tensor]:
        """What an adapter's method derives for its slots here by another plan, by name."""
        derive = guarded(self._sites[adapter][1].derive, str(site.config.peft_type), site.path)
        return derived(site, self.device, partial(derive, site.config, site.layer))

    def _view(self, adapter: str, p: float, named: Mapping[str, Slot]) -> None:
        site, tuner = self._sites[adapter]
        holders = {label: holder_of(self.room, slot, adapter) for label, slot in named.items()}
        slots = {label: find_in(holders[label], slot, adapter) for label, slot in named.items()}
        sees = not site.parameter  # its inputs
        dropout = dropout_of(self, self.dropout_name, adapter, p) if sees else None
        self._parts[adapter] = Part(
            tuner,
            view_class(tuple(slots))(adapter, site, slots, holders, self),
            site.path,
            dropout,
            site.parameter,
            named,
        )

    @whole
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors; raises `PeftcError` while it is merged.

        For who goes through a model's layers: if nothing of it is active any more, the first adapter that is here takes over,
        and trains if the deleted one did.
        """
        acted = adapter_name in self._active
        trained = any(tensor.requires_grad for _, tensor in self.parameters_of(adapter_name))
        self.remove(adapter_name)
        if not acted or self._active:
            return
        if not self._shared.active and self._sites:  # other layers follow this one
            self._shared.active = (min(self._sites),)
            tell([adapter_name], *self._shared.active)
        self.activate(self._shared.active)
        self.set_requires_grad(self._active, trained)

    def remove(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors, and let nothing take over."""
        if adapter_name not in self._sites:
            return
        if adapter_name in self.merged_adapters:
            what = f"`{adapter_name}` is merged into the weight of this layer"
            raise PeftcError(rules.WHILE_MERGED(what, fix="Call `unmerge_adapter()` first."))
        keep(self, self._shared)
        keep_entries(self._sites, self._parts, self.scaling, self.held)
        site, _ = self._sites.pop(adapter_name)
        for slot in site.slots:
            drop(self.room, slot, adapter_name)
        drop_dropout(self, self.dropout_name, adapter_name)
        self._parts.pop(adapter_name)
        self.scaling.pop(adapter_name)
        self.held.pop(adapter_name, None)
        self._active = tuple(name for name in self._active if name != adapter_name)
        self._shared.active = tuple(name for name in self._shared.active if name != adapter_name)
        self._choose_path()
        self.forget(adapter_name)

    def join(self, shared: Shared) -> None:
        """Have in common with other layers what a model's layers share."""
        keep(self)
        self.__dict__["_shared"] = shared
        if shared.by_rows:
            self._choose_path()

    @property
    def call(self) -> Call | None:
        """The call of the model that is open here."""
        return self._shared.call

    def parameters_of(self, adapter: str) -> Iterable[tuple[bool, Tensor]]:
        """The adapter's tensors, derived ones included, each with whether its slot is trainable."""
        if adapter in self._sites:
            held = self.held.get(adapter, ())
            for label, slot in labelled(self._sites[adapter][0].slots).items():
                container, key = find(self.room, slot, adapter)
                tensor = container.get(key)
                if tensor is None:  # computed from others
                    tensor = self._parts[adapter].view[label]
                yield slot.trainable and label not in held, tensor

    def exchange(self, adapter: str, site: MapSite) -> None:
        """Let an adapter whose tensors were exchanged follow another plan, by the same mathematics.

        A scaling that is a tensor stays one, and nothing is composed anew.
        """
        old, tuner = self._sites[adapter]
        scaling = guarded(tuner.scaling, str(site.config.peft_type), site.path)(site.config, site.layer)
        own: float | Tensor = self.scaling[adapter]
        keep_entry(self._sites, adapter)
        note(setattr, self._parts[adapter].view, "config", old.config)
        self._sites[adapter] = (site, tuner)
        self._parts[adapter].view.config = site.config
        if isinstance(own, Tensor):
            keep_values(own)
            own.fill_(scaling)
        else:
            keep_entry(self.scaling, adapter)
            self.scaling[adapter] = scaling

    def where(self, adapter: str, slot: Slot) -> tuple[dict[str, Any], str]:
        """Where a tensor is looked up. Raises `KeyError` if the adapter is not here."""
        return find(self.room, slot, adapter)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._sites)

    def holds(self, adapter: str) -> bool:
        """Whether an adapter is on the layer."""
        return adapter in self._sites

    def site(self, adapter: str) -> MapSite:
        """The plan's site of an adapter. Raises `KeyError`."""
        return self._sites[adapter][0]

    def part(self, adapter: str) -> Part:
        """An adapter's mathematics with its view of this layer. Raises `KeyError`."""
        return self._parts[adapter]

    def dropouts(self) -> nn.ModuleDict:
        """What drops inputs of each adapter in training; the identity for those that drop none. All are called from now on."""
        found = all_dropouts(self, self.dropout_name, self._parts)
        self._choose_path()
        return found

    # activation ---------------------------------------------------------------------------------------------------

    @whole
    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters, in this order, and make exactly their trainable slots require gradients."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.set_requires_grad(self._sites, False)
        self.set_requires_grad(names, not inference_mode)
        keep(self._shared)
        self._shared.active = names  # who calls this calls it on every layer
        self.activate(names)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Make the trainable slots of adapters require gradients, or all their slots not."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            for trainable, parameter in self.parameters_of(name):
                if parameter.is_leaf:
                    keep_trained(parameter, trainable and requires_grad)

    def activate(self, names: Sequence[str]) -> None:
        """Activate without touching what requires gradients; names that the layer does not have are passed over."""
        keep(self)
        self.__dict__["_active"] = tuple(name for name in names if name in self._sites)
        self._choose_path()
        if self._shared.rebases:
            self.rebase()

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapters act, or not, merged ones too. Trainability stays as it is."""
        state = self.__dict__  # not by setattr, in which torch looks for parameters and modules
        keep_entry(state, "_disabled")
        keep_entry(state, "_path")
        state["_disabled"] = not enabled
        if self._shared.merges:
            self.settle()
        if self._shared.rebases:
            self.rebase()
        self._take_path()

    def _take_path(self) -> None:
        state = self.__dict__
        state["_path"] = state["_modules"]["base_layer"] if state["_disabled"] else state["_composed"]

    def _nest(self) -> None:
        """Let a wrapper below know this one."""
        self.__dict__["_outer"] = None
        if isinstance(self.base_layer, TunerLayer):
            self.base_layer.__dict__["_outer"] = ref(self)

    def _choose_path(self) -> None:
        # into __dict__, not by setattr: a path may be the base layer, which would be registered as a child once more
        state, base = self.__dict__, self.base_layer
        between = base.in_effect if isinstance(base, TunerLayer) else tuple
        inner, rows, pending = self.get_base_layer(), self._parts if self._shared.by_rows else None, self._pending()
        split = tensor_parallel.split_of(inner)
        called = base if split is None else tensor_parallel.Whole(base, inner, split)
        under = state["_under"] = Under(called, inner, self.backend, between, self._brought_aside)
        if split is not None and rows is None and not pending:
            state["_composed"] = base
        else:
            path = noticing(self.room, self._shared, under, pending, rows)
            state["_composed"] = path if split is None else tensor_parallel.in_parts(path, inner, split)
        self._take_path()

    def _pending(self) -> list[Part]:
        """What acts beside the weights in place, first to last: active adapters that are not merged into them."""
        if self._is_aside:
            return [self._parts[name] for name in dict.fromkeys((*self.merged_adapters, *self._active))]
        return [self._parts[name] for name in self._active if name not in self.merged_adapters]

    def aside(self) -> dict[str, Any]:
        """Base parameters that were merged into, as they were at first: the innermost wrapper had them first."""
        base = self.base_layer
        return {**self._pristine, **(base.aside() if isinstance(base, TunerLayer) else {})}

    def _brought_aside(self) -> dict[str, Any]:
        """The same, each with its value where the layer computes."""
        base = self.base_layer
        return {**self._found(), **(base._brought_aside() if isinstance(base, TunerLayer) else {})}

    def pristine(self) -> Mapping[str, Tensor]:
        """The base layer's parameters as they were before anything was merged into them, logical and frozen."""
        return opened(self._under)[1]

    def in_effect(self) -> list[Part]:
        """What acts beside the base layer here and in wrappers below, first to last."""
        base = self.base_layer
        below = base.in_effect() if isinstance(base, TunerLayer) else []
        return below if self._disabled else [*below, *self._pending()]

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters of the model; where the layer was told otherwise, those that act here."""
        shared = self._shared.active
        return list(shared if tuple(name for name in shared if name in self._sites) == self._active else self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    # the layer ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not args and self._first in kwargs:
            args = (kwargs.pop(self._first),)
        return self._path(*args, **kwargs)

    def get_base_layer(self) -> nn.Module:
        """The layer under all wrappers."""
        base = self._modules["base_layer"]
        assert base is not None
        return base.get_base_layer() if isinstance(base, TunerLayer) else base

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._read("weight") if self.read_past else self.base_layer.weight  # type: ignore[assignment]  # loose in modules
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self._read("bias") if self.read_past else self.base_layer.bias  # type: ignore[assignment]
        return bias

    def _read(self, name: str) -> Tensor | None:
        return as_read(self._under, self.in_effect(), self._shared, name)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the model reads off its layer (`padding_idx`, `stride`, …) come from the base layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if (name.startswith("_") and name not in PRIVATE) or name == "base_layer":
                raise
            if self.read_past and name == self.parameter:
                return self._read(name)
            if name in self.adapter_layer_names:  # a slot that no adapter has on this kind of layer
                return nn.ModuleDict()
            return getattr(self.get_base_layer(), name)

    @property
    def parameter_name(self) -> str:
        """Which parameter is adapted. Raises `AttributeError` where it is the whole layer."""
        if not self.parameter:
            raise AttributeError("parameter_name")
        return self.parameter

    def chain(self) -> list[TunerLayer]:
        """This wrapper and those below, the innermost first."""
        base = self._modules["base_layer"]
        return [*base.chain(), self] if isinstance(base, TunerLayer) else [self]

    @property
    def backend(self) -> Backend:
        """How the base layer stores and applies its weight."""
        return self._backend

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return places.device_of(self.get_base_layer())

    # copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Views and the chosen path refer to this object's containers: a copy makes its own."""
        own = ("_path", "_composed", "_under", "_parts", "_outer", "_backend")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(dict(state))
        self._backend = backend_of(next(iter(self._sites.values()))[0].layer) if self._sites else BACKENDS[self._kind]
        self._nest()
        self._parts = {}
        for adapter, (site, tuner) in self._sites.items():
            self._view(adapter, tuner.dropout(site.config), labelled(site.slots))
        self._choose_path()

    def _get_name(self) -> str:
        """How it is printed and reported: by method and kind of layer, as in the reference."""
        kind = Kind.LINEAR if self._kind is Kind.CONV1D_TRANSPOSED else self._kind
        of_attention = self.parameter and isinstance(self.get_base_layer(), nn.MultiheadAttention)
        return f"{self.peft_type.lower()}.{'MultiheadAttention' if of_attention else kind.value.capitalize()}"

    def extra_repr(self) -> str:
        return f"adapters={list(self._sites)}, active={list(self._active)}"
