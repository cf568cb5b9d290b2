"""`modules_to_save`: whole modules trained in a copy per adapter, beside the original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.host import parallel
from peftc.host.offload import whole_copy
from peftc.runtime.around.acting import OneActs
from peftc.runtime.around.lifted import called, half_of, lift, narrow, narrowed
from peftc.runtime.bases.places import refuse_gradients_of
from peftc.runtime.call import Call, Shared
from peftc.runtime.journal import keep, keep_entries, keep_entry, keep_trained, whole
from peftc.runtime.layer.wrapper import Source


class AuxiliaryTrainingWrapper(nn.Module):
    """What `isinstance` asks for in other libraries: a wrapper that trains something else than a method's slots."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Keys of a checkpoint, below the wrapped module -> names in this wrapper. Raises `NotImplementedError`."""
        raise NotImplementedError(f"A {type(self).__name__} does not say where a checkpoint's tensors go")


class ModulesToSaveWrapper(OneActs, AuxiliaryTrainingWrapper):
    """A module with a trained copy per adapter. Names are the ecosystem's: `original_module`, `modules_to_save.<adapter>`.

    At most one copy is in effect: that of the first active adapter which has one. A call that names adapters by row has
    each row computed by the copy of its adapter.
    """

    #: what other libraries read of every wrapper
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    other_param_names: ClassVar[tuple[str, ...]] = ()
    merged_adapters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._shared = Shared()

    def join(self, shared: Shared) -> None:
        """Have in common with other layers what a model's layers share."""
        self._shared = shared

    def add(self, adapter: str, root: str, source: Source | None = None, lifted: bool = False) -> None:
        """Copy the original for an adapter; `root` begins the disk keys under which `source` may have its tensors.

        In a `lifted` copy what is in half precision is in float32.
        """
        with parallel.gathering(self.original_module):
            twin = whole_copy(self.original_module)
        for tensor in (*twin.parameters(), *twin.buffers()) if lifted else ():
            lift(tensor)
        for name, tensor in twin.state_dict(keep_vars=True).items():
            tensor.requires_grad_(False)
            found = source(f"{root}{name}") if source is not None else None
            if found is not None:
                tensor.data = found.to(tensor.device, tensor.dtype)
        keep_entry(self.modules_to_save._modules, adapter)
        self.modules_to_save.add_module(adapter, twin)

    def delete_adapter(self, adapter: str) -> None:
        keep(self)
        keep_entries(self.modules_to_save._modules)
        self.modules_to_save._modules.pop(adapter, None)
        if self._active == adapter:
            self._active = None

    def parameters_of(self, adapter: str) -> Sequence[nn.Parameter]:
        """The copy's parameters; empty if the adapter has none here."""
        twin = self.modules_to_save._modules.get(adapter)
        return list(twin.parameters()) if twin is not None else []

    @whole
    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate the first of these adapters that has a copy here, and make exactly its copy require gradients."""
        self.activate((adapter_names,) if isinstance(adapter_names, str) else adapter_names)
        for name in self.modules_to_save:
            self.set_requires_grad(name, name == self._active and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make copies require gradients, or not; copies that are not here are passed over."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            for parameter in self.parameters_of(name):
                if parameter.is_floating_point():
                    keep_trained(parameter, requires_grad)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Keys of a checkpoint, below the module -> names in this wrapper; empty if the adapter has no copy here."""
        twin = self.modules_to_save._modules.get(adapter_name)
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in (twin.state_dict() if twin is not None else ())}

    def activate(self, names: Sequence[str]) -> None:
        keep(self)
        self._active = next((name for name in names if name in self.modules_to_save._modules), None)

    @property
    def current(self) -> nn.Module:
        """The module in effect."""
        if self._active is None or self._disabled:
            return self.original_module
        return self.modules_to_save[self._active]

    def of(self, names: Iterable[str]) -> nn.Module:
        """The module with these adapters in effect, whichever are now: the copy of the first that has one."""
        own = self.modules_to_save._modules
        return next((twin for name in names if (twin := own.get(name)) is not None), self.original_module)

    def taking_over(self, names: Iterable[str]) -> nn.Module:
        """The same, to be in the module's place for good."""
        found = self.of(names)
        return found if found is self.original_module else narrow(found, self.original_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._shared.call if self._shared.by_rows and not self._disabled else None
        if call is None or not call.adapters:
            output = self._called(self.current, args, kwargs)
            refuse_gradients_of(self.current, output)
            return output
        return self._by_rows(call, args, kwargs)

    def _called(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        half = None if module is self.original_module else half_of(module, self.original_module)
        return module(*args, **kwargs) if half is None else called(module, half, args, kwargs)

    def _by_rows(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        count: int = first.shape[0]
        own = self.modules_to_save._modules
        modules: dict[nn.Module, list[Tensor]] = {}
        for adapter, rows in call.rows(count, first.device).items():
            modules.setdefault(own.get(adapter) or self.original_module, []).append(rows)
        if len(modules) == 1:
            (module,) = modules
            return self._called(module, args, kwargs)  # type: ignore[no-any-return]
        places = [torch.cat(rows) for rows in modules.values()]
        parts = []
        for module, rows in zip(modules, places, strict=True):
            given = [_taken(a, rows, count) for a in args]
            found = self._called(module, given, {k: _taken(v, rows, count) for k, v in kwargs.items()})
            if not isinstance(found, Tensor):
                what = f"A {type(module).__name__} returns a {type(found).__name__}, whose rows cannot be put together"
                raise PeftcError(rules.ROWS_DIFFER(what, fix="Call the model once for each adapter."))
            parts.append(found)
        together = torch.cat(parts)
        return together[torch.argsort(torch.cat(places))]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._read("weight")
        return weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in ("original_module", "modules_to_save"):
                raise
            return self._read(name)

    def _read(self, name: str) -> Any:
        """An attribute of the module in effect. Who reads a weight computes with it, in the module's number format."""
        module = self.current
        value = getattr(module, name)
        if module is self.original_module or not isinstance(value, Tensor):
            return value
        return narrowed(self.original_module, name, value)


def _taken(value: Any, rows: Tensor, count: int) -> Any:
    """The rows of what has as many as the batch; anything else as it is."""
    return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value
