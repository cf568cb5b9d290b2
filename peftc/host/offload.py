"""accelerate: weights that lie in main memory or on the disk, and are brought to a module for the time of its call.

What is relied on, of `accelerate.hooks` (0.20): such a module has an `AlignDevicesHook` as `_hf_hook`, alone or in the
`hooks` of a `SequentialHook`; where its `offload` is set, the module's parameters are on the meta device, their values are in
the mapping `weights_map` under their names in the module, and a call brings them from there to `execution_device` anew. The
module's own forward is kept as `_old_forward` while another stands in its place. Of the values on the disk, an
`OffloadedWeightsLoader` (`accelerate.utils.offload`) knows by `index`, those in memory by `state_dict`.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_HOOK, _FORWARD, _OWN = "_hf_hook", "forward", "_old_forward"


def hook_of(module: nn.Module) -> Any | None:
    """The hook that brings a module's tensors for each call; None where they stay with the module."""
    hook = module.__dict__.get(_HOOK)
    if hook is None:
        return None
    found = (part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "offload", False) is True)
    return next((part for part in found if part.weights_map is not None), None)


def device_of(hook: Any) -> torch.device:
    """Where the hook brings tensors to."""
    return torch.device("cpu") if hook.execution_device is None else torch.device(hook.execution_device)


def brought(module: nn.Module, name: str) -> Tensor | None:
    """The value of a module's tensor that is kept elsewhere, where a call would have it; None if nothing brings it."""
    hook = hook_of(module)
    if hook is None:
        return None
    try:
        value: Tensor = hook.weights_map[name]
    except KeyError:
        return None
    return value.to(device_of(hook))


def kept(module: nn.Module) -> Mapping[str, Tensor] | None:
    """What the hook brings tensors from; None where they stay with the module."""
    hook = hook_of(module)
    return None if hook is None else hook.weights_map


def held(module: nn.Module, name: str) -> Tensor | None:
    """The tensor in memory that a hook brings; None where nothing brings it, or it is read from a file each time."""
    values = kept(module)
    return None if values is None or name not in values or _is_on_disk(values, name) else values[name]


def keep(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """From now on, let the module's hook bring `values`; other tensors come from where they came from."""
    hook = hook_of(module)
    assert hook is not None
    hook.weights_map = values


def changed(before: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same values but for some, which are kept where the ones in their place are: in memory, or on the disk."""
    return _Changed(before, changes)


def related(one: Mapping[str, Tensor], other: Mapping[str, Tensor] | None) -> bool:
    """Whether both are the same values but for what `changed` changed."""
    return other is not None and any(a is b for a in _history(one) for b in _history(other))


def _history(values: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    yield values
    while isinstance(values, _Changed):
        values = values.before
        yield values


class _Changed(Mapping[str, Tensor]):
    """Values over others. Those for values on the disk are in a folder that lives as long as this."""

    def __init__(self, before: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> None:
        self.before = before
        self._folder: _Folder | None = None
        self._own: dict[str, Tensor | Path] = {}
        for name, value in changes.items():
            value = value.detach().to("cpu")
            self._own[name] = self._stored(name, value) if _is_on_disk(before, name) else value

    def _stored(self, name: str, value: Tensor) -> Path:
        from safetensors.torch import save_file

        self._folder = self._folder or _Folder()
        path = self._folder.path / f"{len(self._own)}.safetensors"
        save_file({name: value.contiguous()}, path)
        return path

    def __getitem__(self, name: str) -> Tensor:
        own = self._own.get(name)
        if own is None:
            return self.before[name]
        if isinstance(own, Tensor):
            return own
        from safetensors import safe_open

        with safe_open(own, "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.before, *self._own)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Changed:
        """A copy shares what is never written to."""
        twin: _Changed = copy.copy(self)
        memo[id(self)] = twin
        return twin


class _Folder:
    """A folder that is there as long as this is."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="peftc-offload-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _is_on_disk(values: Mapping[str, Tensor], name: str) -> bool:
    """Whether a value is read from a file whenever it is asked for."""
    while True:
        inner: Any = values
        if isinstance(inner, _Changed):
            if name in inner._own:
                return isinstance(inner._own[name], Path)
            values = inner.before
        elif type(inner).__name__ == "PrefixedDataset":
            values, name = inner.dataset, f"{inner.prefix}{name}"
        else:
            return name in getattr(inner, "index", ()) and name not in getattr(inner, "state_dict", ())


# running without the hook ---------------------------------------------------------------------------------------------


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """Within, a call of the module does not bring its tensors: those in place are computed with."""
    state = module.__dict__
    if hook_of(module) is None or _OWN not in state or _FORWARD not in state:
        yield
        return
    hooked = state[_FORWARD]
    state[_FORWARD] = state[_OWN]
    try:
        yield
    finally:
        state[_FORWARD] = hooked


def moved(hook: Any, given: Any) -> Any:
    """Arguments of a call where the hook would have them. Relied on: `accelerate.utils.send_to_device` (0.10)."""
    from accelerate.utils import send_to_device  # type: ignore[import-untyped]

    return send_to_device(given, device_of(hook))


# copies ---------------------------------------------------------------------------------------------------------------


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy of a module, with the modules in it, whose tensors stay with it, where the original is computed."""
    offloaded = [(path, part) for path, part in module.named_modules() if hook_of(part) is not None]
    if not offloaded:
        return copy.deepcopy(module)
    aside = [
        (part, {name: part.__dict__.pop(name) for name in _ATTRIBUTES if name in part.__dict__})
        for _, part in offloaded
    ]
    try:
        twin = copy.deepcopy(module)
    finally:
        for part, attributes in aside:
            part.__dict__.update(attributes)
    for path, part in offloaded:
        own, hook = twin.get_submodule(path), hook_of(part)
        for tensors in (own._parameters, own._buffers):
            for name, tensor in tensors.items():
                value = brought(part, name) if tensor is not None and tensor.is_meta else None
                if value is not None and tensor is not None:
                    value = value.detach().clone()
                    made = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                    tensors[name] = made  # type: ignore[assignment]  # a parameter among parameters
        _align(own, device_of(hook))
    return twin


#: What accelerate puts on a module, beside wrappers of methods that only warn.
_ATTRIBUTES = (_HOOK, _OWN, _FORWARD)


def _align(module: nn.Module, device: torch.device) -> None:
    """Have the arguments of the module's calls moved to a device, as they are for an original that is offloaded."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # type: ignore[import-untyped]

    add_hook_to_module(module, AlignDevicesHook(execution_device=device))
