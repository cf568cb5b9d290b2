"""What a plan says of targets that were given by names of layers that are parameters now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Targets that mean parameters by the names of what those were: `entries` of the config mean `layers`, which are one
    parameter now, written as `parameter` into the config. Without `layers` it was always a parameter.

    `options` that are others than for one of the layers: `(option, for a layer, for the parameter)`.
    """

    entries: tuple[str, ...]
    layers: tuple[str, ...]
    parameter: str
    options: tuple[tuple[str, Any, Any], ...] = ()

    def __str__(self) -> str:
        changes = ", ".join(f"{name} {before} → {now}" for name, before, now in self.options)
        told = f" with {changes}" if changes else ""
        return f"{', '.join(self.layers) or ', '.join(self.entries)} → {self.parameter}{told}"
