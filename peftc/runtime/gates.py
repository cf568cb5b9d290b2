"""Coefficients that a call gives adapters on each layer and token, and a layer's forward while a call gives some.

Only layers that hold such adapters look for them; which these are is settled when adapters are activated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.runtime.call import Shared
from peftc.runtime.parts import Part, Under
from peftc.runtime.paths import Path, update_of_branch, update_of_thin


@dataclass(frozen=True)
class Gates:
    """What multiplies updates. `values` is one number for all, or `(batch, tokens, layers, adapters)`; `layers` and
    `adapters` give the places of paths and adapter names in it."""

    values: float | Tensor
    layers: Mapping[str, int] = field(default_factory=dict)
    adapters: Mapping[str, int] = field(default_factory=dict)

    def of(self, path: str, adapter: str, y: Tensor) -> float | Tensor:
        """The coefficient of an adapter's update on a layer whose output is `y` `(batch, tokens, out)`, or with batch and
        tokens in one dimension. Raises `PeftcError` if `y` has other tokens."""
        if not isinstance(self.values, Tensor):
            return self.values
        gate = self.values[:, :, self.layers[path], self.adapters[adapter]]
        if y.shape[:-1] == (1, gate.shape[1]):  # what all rows share, such as positions
            return gate.unsqueeze(-1)
        if gate.numel() * y.shape[-1] != y.numel():
            what = f"`{path}` computes {y.numel() // y.shape[-1]} tokens, the call weighs {gate.numel()}"
            fix = "Use adapters on layers that see every token of the input once."
            raise PeftcError(rules.CANNOT_GATE(what, fix=fix, where=path))
        return gate.reshape(*y.shape[:-1], 1)


def is_gated(shared: Shared, parts: Sequence[Part]) -> bool:
    """Whether calls may multiply the updates of one of these adapters."""
    return not shared.gated.isdisjoint(part.view.adapter for part in parts)


def gated(plain: Path, shared: Shared, under: Under, parts: Sequence[Part]) -> Path:
    """The plain path, but while a call is open that weighs adapters, their updates by its coefficients."""
    updates = [(part, _update(under, part)) for part in parts]

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = shared.call
        if call is None or call.gates is None:
            return plain(x, *args, **kwargs)
        y: Tensor = under.base(x, *args, **kwargs)
        if not isinstance(call.gates.values, Tensor) and call.gates.values == 0.0:
            return y
        for part, update in updates:
            gate = call.gates.of(part.path, part.view.adapter, y)
            y = (y + update(x, y) * gate).to(y.dtype)
        return y

    return run


def _update(under: Under, part: Part) -> Callable[[Tensor, Tensor], Tensor]:
    if "thin" in part.tuner.lowerings:
        thin = update_of_thin(under, part)
        return lambda x, y: thin(x)
    return update_of_branch(under, part)
