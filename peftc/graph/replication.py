"""Which layers of a stack are repeated, and what they were before. Replicas share the weights of the layer that they are copies
of; everything after this sees them as layers of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: The option that asks for it.
REPLICATION_OPTION = "layer_replication"
#: Ranges of layers, `[start, end)`, one after the other.
Ranges = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Replication:
    """The list of layers at the path `stack` had `count` of them; now it has one for each of `sources`, in this order."""

    stack: str
    count: int
    sources: tuple[int, ...]

    def origin(self, name: str) -> str:
        """The name that a module or parameter had before."""
        start = f"{self.stack}."
        if not name.startswith(start):
            return name
        index, dot, rest = name.removeprefix(start).partition(".")
        return f"{start}{self.sources[int(index)]}{dot}{rest}" if index.isdigit() else name

    def replica(self, name: str) -> str | None:
        """The first name that a module or parameter has now, whose name before this is; None if its layer is left out."""
        start = f"{self.stack}."
        index, dot, rest = name.removeprefix(start).partition(".")
        if not name.startswith(start) or not index.isdigit():
            return name
        return f"{start}{self.sources.index(int(index))}{dot}{rest}" if int(index) in self.sources else None
