"""What weights were before a library fused or renamed them: the names that published adapters and configs use.

A model may hold as one tensor what was many linear layers when its checkpoints were made: `experts.gate_up_proj` of shape
(experts, 2 · width, hidden) was `experts.0.w1`, `experts.0.w3`, `experts.1.w1`, …. The facts are frozen data of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

#: Stands for the index of the expert in a former path.
EXPERT = "{expert}"

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class FormerLayers:
    """One parameter of a module, or of repeated modules, and the linear layers that it was.

    `module` and `layers` are dotted paths in which `*` stands for a number; the numbers are the same in both and in the same
    order. With `{expert}` in `layers` the parameter is (experts, rows, columns) and each layer was one expert's; without,
    the parameter is a weight (out, in) of a single layer that had another path. `layers` are in the order of their rows:
    each has an equal part of the parameter's logical outputs, the first one the first part. A former layer's own weight was
    (out, in).
    """

    module: str
    parameter: str
    layers: tuple[str, ...]

    @property
    def of_experts(self) -> bool:
        """Whether the parameter holds the layers of several experts."""
        return all(EXPERT in layer.split(".") for layer in self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' own names, such as `("w1", "w3")`."""
        return tuple(layer.rpartition(".")[2] for layer in self.layers)

    def at(self, module: str) -> FormerLayers:
        """The same for one module, given by its path: numbers in place of the stars."""
        found = _NUMBER.findall(module)
        return FormerLayers(module, self.parameter, tuple(filled(layer, found) for layer in self.layers))


@dataclass(frozen=True, slots=True)
class FormerPlace:
    """Where a former layer is now: its part of a module's parameter.

    `part` counts the layers that were joined by rows, of `parts`. `expert` is the index in the first dimension, None where
    the parameter is a single layer's.
    """

    module: str
    parameter: str
    part: int
    parts: int
    expert: int | None


class FormerNames:
    """The former layers of one model, found by the module's path of today or by their own."""

    def __init__(self, layers: Iterable[FormerLayers]) -> None:
        self.layers = tuple(layers)

    def of(self, module: str) -> tuple[FormerLayers, ...]:
        """What the module at this path was, a record for each of its parameters that had other names."""
        return tuple(former.at(module) for former in self._by_module.get(starred(module), ()))

    def find(self, path: str) -> FormerPlace | None:
        """Where the layer of this former path is now, None if no layer had that path.

        >>> FormerNames([FormerLayers("h.*.experts", "up", ("h.*.moe.{expert}.w1",))]).find("h.3.moe.7.w1")
        FormerPlace(module='h.3.experts', parameter='up', part=0, parts=1, expert=7)
        """
        found = self._by_layer.get(starred(path))
        if found is None:
            return None
        former, part = found
        expert = None
        numbers = _NUMBER.findall(path)
        if former.of_experts:
            slots = [piece for piece in former.layers[part].split(".") if piece in ("*", EXPERT)]
            expert = int(numbers.pop(slots.index(EXPERT)))
        return FormerPlace(filled(former.module, numbers), former.parameter, part, len(former.layers), expert)

    @cached_property
    def _by_module(self) -> Mapping[str, tuple[FormerLayers, ...]]:
        table: dict[str, tuple[FormerLayers, ...]] = {}
        for former in self.layers:
            table[former.module] = (*table.get(former.module, ()), former)
        return table

    @cached_property
    def _by_layer(self) -> Mapping[str, tuple[FormerLayers, int]]:
        return {
            layer.replace(EXPERT, "*"): (former, part)
            for former in self.layers
            for part, layer in enumerate(former.layers)
        }


def starred(path: str) -> str:
    """A path with `*` for each number: `model.layers.3.mlp` is `model.layers.*.mlp`."""
    return _NUMBER.sub("*", path)


def filled(path: str, numbers: Iterable[str]) -> str:
    """A path with these numbers in place of its stars, in order. Raises `StopIteration` never: stars left over stay."""
    left = iter(numbers)
    return ".".join(next(left, piece) if piece == "*" else piece for piece in path.split("."))
