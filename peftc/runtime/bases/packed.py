"""Linear layers whose weight a library stores in a form of its own: one backend for all storages.

Where a call of the layer serves, the weight is never opened. It is where a method needs its numbers, for as long as it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.ops.linear import is_unwatched
from peftc.ops.lowrank import is_traced
from peftc.registry.boundary import boundary
from peftc.runtime.bases import rounding
from peftc.runtime.bases.linear import LinearBackend
from peftc.runtime.bases.places import change, held_by, tensor_of
from peftc.tuner.storage import Storage


class PackedBackend(LinearBackend):
    """A linear layer in one storage."""

    opens_anew = True

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.gives_fresh = self.is_plain_linear = storage.fresh

    def opened(self, base: nn.Module) -> dict[str, Tensor]:
        with boundary(self._who, "open"):
            weight = self._storage.open(base).detach()
        bias = tensor_of(base, "bias")
        return {"weight": weight, **({} if bias is None else {"bias": bias.detach()})}

    def opened_with(self, base: nn.Module, kept: Mapping[str, Any]) -> dict[str, Tensor]:
        with _in_place(base, kept):
            return self.opened(base)

    def run(self, base: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> Tensor:
        (x,) = args
        weight, bias = parameters["weight"], parameters.get("bias")
        dtype = weight.dtype if x.dtype == weight.dtype else torch.promote_types(x.dtype, weight.dtype)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)

    def replaced(self, base: nn.Module, changed: Mapping[str, Tensor], path: str) -> dict[str, Any]:
        """The weight is packed anew, with the layer's own settings. Raises `PeftcError` if the storage takes no other."""
        rest = {name: tensor for name, tensor in changed.items() if name != "weight"}
        owned = {name: own for name in rest if isinstance(own := held_by(base, name), Tensor)}
        beside = {name: rest.pop(name).to(own.dtype) for name, own in owned.items() if name not in base._parameters}
        gained = [name for name in rest if name in base._parameters and base._parameters[name] is None]
        dtype = self.opened(base)["weight"].dtype if gained else None
        new = {name: nn.Parameter(rest.pop(name).to(dtype), requires_grad=False) for name in gained}
        made = {**beside, **new, **(super().replaced(base, rest, path) if rest else {})}
        if "weight" not in changed:
            return made
        why = self._storage.cannot_pack(base)
        if why:
            what = f"The weight of `{path}` is stored by {self._storage.name}, and takes no other: {why}"
            fix = "Load the base without quantisation and merge there, or keep the adapter beside the layer."
            raise PeftcError(rules.PACKED_FOR_GOOD(what, fix=fix, where=path))
        weight = changed["weight"].contiguous()
        with boundary(self._who, "pack", path):
            anew = self._storage.pack(base, weight)
        if rounding.is_asked():
            rounding.measured(
                path, self._storage.name, self.opened(base)["weight"], weight, self.opened_with(base, anew)["weight"]
            )
        return {**made, **anew}

    def can_refold(self, base: nn.Module, x: Tensor) -> bool:
        return is_unwatched(base) and not torch.is_autocast_enabled(x.device.type) and not is_traced()

    def exchanged(self, base: nn.Module, index: Tensor, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        bias = tensor_of(base, "bias")
        own = F.linear(x.to(values.dtype), values, None if bias is None else bias[index].to(values.dtype))
        return y.index_copy_(-1, index, own.to(y.dtype))

    @property
    def _who(self) -> str:
        return f"the storage `{self._storage.name}`"


@contextmanager
def _in_place(base: nn.Module, kept: Mapping[str, Any]) -> Iterator[None]:
    """Within, a layer has what was set aside of it."""
    now = {name: held_by(base, name) for name in kept}
    change(base, kept)
    try:
        yield
    finally:
        change(base, now)
