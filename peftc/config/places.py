"""Places inside a document: a location as data, its text (`$.adapters.default.r`), and where it stands in the file.

A location is a tuple of keys and indices from the root. It is the one currency between the reader, which knows lines,
and the validators, which know paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from peftc.diagnostics import Diagnostic, Where
from peftc.limits import MAX_DEPTH, MAX_INTEGER

Location = tuple[str | int, ...]
#: line and column, both from 1; the column counts characters
Position = tuple[int, int]

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def json_path(location: Location, root: str = "$") -> str:
    """The location as text: `$.adapters.default.rank_pattern["a.b"][0]`."""
    text = root
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _BARE.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += '["' + part.replace("\\", "\\\\").replace('"', '\\"') + '"]'
    return text


def beyond_64_bits(data: object, place: Location = ()) -> Iterator[Location]:
    """Where in plain data whole numbers stand that no file can hold."""
    if isinstance(data, int):
        if abs(data) > MAX_INTEGER:
            yield place
    elif isinstance(data, Mapping) and len(place) < MAX_DEPTH:
        for key, value in data.items():
            yield from beyond_64_bits(value, (*place, str(key)))
    elif isinstance(data, (list, tuple)) and len(place) < MAX_DEPTH:
        for index, value in enumerate(data):
            yield from beyond_64_bits(value, (*place, index))


@dataclass(slots=True)
class Positions:
    """Where every key and every value of a document begins."""

    keys: dict[Location, Position] = field(default_factory=dict)
    values: dict[Location, Position] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """Plain data from a file, and where each piece of it stands. `locate` is called when the first place is asked for."""

    file: str
    data: Any
    locate: Callable[[], Positions]
    #: what was refused while reading although the rest could be read: told together with what the validators find
    problems: tuple[Diagnostic, ...] = ()

    @cached_property
    def positions(self) -> Positions:
        return self.locate()

    def position(self, location: Location, key: bool = False) -> Position:
        """Line and column of the value there (of its key with `key`); of the nearest enclosing one if there is none."""
        if key and location in self.positions.keys:
            return self.positions.keys[location]
        for length in range(len(location), -1, -1):
            if location[:length] in self.positions.values:
                return self.positions.values[location[:length]]
        return 1, 1

    def where(self, location: Location = (), key: bool = False) -> Where:
        """The place for a diagnostic: file, line, column and path."""
        return Where(self.file, *self.position(location, key), path=json_path(location))
