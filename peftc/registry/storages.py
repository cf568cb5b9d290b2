"""Which storages there are: entry-point group `peftc.storages`, the entry's name is the storage's.

The bundled ones come through the same door as those of any other package. A layer's storage is found by the names of its classes,
so that no library of quantisation is imported to look; all storages are loaded to look once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, ClassVar

from peftc import rules
from peftc.diagnostics import Diagnostic, did_you_mean
from peftc.registry import hookspecs
from peftc.registry.door import Claim, Door
from peftc.tuner.storage import Storage


class Storages(Door[Storage]):
    """The storages of one process."""

    group: ClassVar[str] = hookspecs.STORAGES_GROUP
    hook: ClassVar[str] = "peftc_storage"
    record: ClassVar[type[Any]] = Storage

    def __init__(self, claims: Iterable[Claim] | None = None, blocked: frozenset[str] | None = None) -> None:
        super().__init__(claims, blocked)
        #: what was found for a class of layers and one of weights
        self._found: dict[tuple[type, type | None], tuple[Storage, ...]] = {}

    def key_of(self, record: Storage) -> str:
        return record.name

    def problem(self, key: str, answer: object) -> str:
        if answer is None:
            return "no function is marked `@hookimpl` and called `peftc_storage`"
        if not isinstance(answer, Storage):
            return f"`peftc_storage` returned a `{type(answer).__name__}`, not a `Storage`"
        return "; ".join(_wrong(answer, key))

    def unknown(self, key: str) -> Diagnostic:
        hint: str = did_you_mean(key, self.names)
        install = f"Install the package that brings it: one with an entry point `{key}` in the group `{self.group}`."
        what = f"No storage of weights is called `{key}`; there are {', '.join(self.names)}"
        return rules.STORAGE_UNKNOWN(what, fix=f"{hint} {install}".strip())

    def of_class(self, cls: type, tensor: type | None) -> tuple[Storage, ...]:
        """The storages that layers of a class may be in, whose `weight` is of the class `tensor`. One that cannot be loaded is told
        where it is asked for by name, and knows no layer."""
        if (cls, tensor) not in self._found:
            layers, tensors = set(_names(cls)), set() if tensor is None else set(_names(tensor))
            fitting = (s for s in self.load_all() if layers.intersection(s.classes) or tensors.intersection(s.tensors))
            self._found[cls, tensor] = tuple(fitting)
        return self._found[cls, tensor]

    def register(self, plugin: object, name: str = "", over: bool = True) -> Storage:
        self._found.clear()
        return super().register(plugin, name, over)

    def forget(self, key: str) -> None:
        self._found.clear()
        super().forget(key)


def _names(cls: type) -> Iterator[str]:
    return (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)


def _wrong(storage: Storage, key: str) -> Iterator[str]:
    name = getattr(storage, "name", None)
    if not isinstance(name, str) or name != name.lower() or not name:
        yield f"`name` is {name!r:.60}, not a text in lower case"
    elif key and name != key:
        yield f"the record says `{name}`, the entry point `{key}`"
    for option in ("classes", "tensors", "held", "openers"):
        value = getattr(storage, option)
        if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
            yield f"`{option}` is {value!r:.60}, not a tuple of texts"
    if not storage.classes and not storage.tensors:
        yield "neither `classes` nor `tensors` says which layers are stored so"
    if (
        not storage.unwritable
        and type(storage).pack is Storage.pack
        and type(storage).cannot_pack is Storage.cannot_pack
    ):
        yield "it gives no `pack`, and does not say why not (`unwritable`, `cannot_pack`)"


@cache
def default_storages() -> Storages:
    """The storages that are installed, made on first use."""
    return Storages()
