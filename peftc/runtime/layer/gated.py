"""Coefficients that a call gives adapters on each layer and token, and a layer's forward while a call gives some.

Only layers that hold such adapters look for them; which these are is settled when adapters are activated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from peftc.runtime.call import Shared
from peftc.runtime.layer.parts import Part, Path, Under
from peftc.runtime.layer.paths import update_beside, update_of_thin


def is_gated(shared: Shared, parts: Sequence[Part]) -> bool:
    """Whether calls may multiply the updates of one of these adapters."""
    return not shared.gated.isdisjoint(part.view.adapter for part in parts)


def gated(plain: Path, shared: Shared, under: Under, parts: Sequence[Part]) -> Path:
    """The plain path, but while a call is open that weighs adapters, their updates by its coefficients. What waits for a token
    does not act in a call that says nothing."""
    updates = [(part, update_of(under, part)) for part in parts]
    waits = any(part.tuner.waits for part in parts)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = shared.call
        gates = None if call is None else call.gates
        if gates is None and not waits:
            return plain(x, *args, **kwargs)
        y: Tensor = under.base(x, *args, **kwargs)
        for part, update in updates:
            gate = float(not part.tuner.waits) if gates is None else gates.of(part.path, part.view.adapter, y)
            if isinstance(gate, Tensor) or gate != 0.0:
                y = (y + update(x, y) * gate).to(y.dtype)
        return y

    return run


def update_of(under: Under, part: Part) -> Callable[[Tensor, Tensor], Tensor]:
    """`x, y -> Δy` of an adapter that says what it adds to an output."""
    if "thin" in part.tuner.lowerings:
        thin = update_of_thin(under, part)
        return lambda x, y: thin(x)
    return update_beside(under, part)
