"""`modules_to_save`: whole modules trained in a copy per adapter, beside the original."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peftc.runtime.layer import Source


class ModulesToSaveWrapper(nn.Module):
    """A module with a trained copy per adapter. Names are the ecosystem's: `original_module`, `modules_to_save.<adapter>`.

    At most one copy is in effect: that of the first active adapter which has one.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._active: str | None = None
        self._disabled = False

    def add(self, adapter: str, root: str, source: Source | None = None) -> None:
        """Copy the original for an adapter; `root` begins the disk keys under which `source` may have its tensors."""
        twin = copy.deepcopy(self.original_module)
        for name, tensor in twin.state_dict(keep_vars=True).items():
            tensor.requires_grad_(False)
            found = source(f"{root}{name}") if source is not None else None
            if found is not None:
                tensor.data = found.to(tensor.device, tensor.dtype)
        self.modules_to_save.add_module(adapter, twin)

    def delete_adapter(self, adapter: str) -> None:
        self.modules_to_save._modules.pop(adapter, None)
        if self._active == adapter:
            self._active = None

    def parameters_of(self, adapter: str) -> Sequence[nn.Parameter]:
        """The copy's parameters; empty if the adapter has none here."""
        twin = self.modules_to_save._modules.get(adapter)
        return list(twin.parameters()) if twin is not None else []

    def activate(self, names: Sequence[str]) -> None:
        self._active = next((name for name in names if name in self.modules_to_save._modules), None)

    def enable_adapters(self, enabled: bool) -> None:
        self._disabled = not enabled

    @property
    def active_adapters(self) -> list[str]:
        return [self._active] if self._active is not None else []

    @property
    def active_adapter(self) -> str | None:
        return self._active

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @property
    def current(self) -> nn.Module:
        """The module in effect."""
        if self._active is None or self._disabled:
            return self.original_module
        return self.modules_to_save[self._active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.current.weight  # type: ignore[assignment]  # modules type attributes loosely
        return weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.current, name)
