"""Which layer a shared tensor is named after: the first, in the order of the model, of those that have it together."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from peftc import rules
from peftc.compiler.passes.draft import Context
from peftc.diagnostics import PeftcError
from peftc.tuner.slots import Share, Slot


class Homes:
    """Homes of one adapter's shared slots, filled as its layers are passed in order.

    Layers with equal slots and homes get one tuple, as what is equal of sites is one object.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._first: dict[tuple[str, str, str], tuple[str, Slot]] = {}
        self._known: dict[tuple[int, tuple[str | None, ...]], tuple[Slot, ...]] = {}

    def found(self, path: str, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        """A layer's slots with their homes. Raises `PeftcError` if layers would share a tensor of several shapes."""
        homes = tuple(self._home(path, slot) if slot.share else None for slot in slots)
        key = id(slots), homes
        if key not in self._known:
            settled = (replace(slot, home=home) for slot, home in zip(slots, homes, strict=True))
            self._known[key] = tuple(settled)
        return self._known[key]

    def _home(self, path: str, slot: Slot) -> str | None:
        key = slot.share
        if key == Share.WEIGHT:
            weight = f"{path}.weight"
            key = f"{key} {self._context.graph.alias_of.get(weight, weight)}"
            if key.removeprefix(f"{slot.share} ") not in self._tied:
                return None
        home, first = self._first.setdefault((key, slot.name, slot.tail), (path, slot))
        if first.shape != slot.shape:
            what = (
                f"`{slot.name}` is {list(first.shape)} on `{home}` and {list(slot.shape)} on `{path}`, which share it"
            )
            fix = "Give it one shape in the plugin's `declare`, or another `share`."
            raise PeftcError(rules.PLUGIN_INVALID(what, fix=fix, where=path))
        return "" if slot.share == Share.MODEL else home

    @cached_property
    def _tied(self) -> frozenset[str]:
        return frozenset(self._context.graph.alias_of.values())
