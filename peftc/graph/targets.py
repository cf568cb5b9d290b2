"""Which modules are adapted when a config names none: tables by model type, as data (`default_targets.json`).

A method's record names its table; tables may be the same as another, or differ from one in a few model types. The values
are the reference's. What a table's entries mean in roles is data too, for model types that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from peftc import rules
from peftc.diagnostics import PeftcError, did_you_mean
from peftc.graph.nodes import Role

#: A list of module names, or one regular expression over the full path.
Targets = list[str] | str


def default_targets(table: str, model_type: str | None) -> Targets | None:
    """The targets that a table has for a model type, None if it has none. Raises `PeftcError` on an unknown table."""
    found = _table(table).get(model_type) if model_type is not None else None
    return list(found) if isinstance(found, list) else found


def has_table(table: str) -> bool:
    """Whether there is a table of this name."""
    return table in _data()


@dataclass(frozen=True, slots=True)
class TableRoles:
    """What the entries of a table are for in their models: layers of the `needed` roles, and of `wanted` ones if there are any."""

    needed: tuple[Role, ...] = ()
    wanted: tuple[Role, ...] = ()

    @property
    def all(self) -> tuple[Role, ...]:
        return (*self.needed, *self.wanted)


def table_roles(table: str) -> TableRoles:
    """What a table's entries mean. Raises `PeftcError` on an unknown table."""
    entry = _entry(table)
    return TableRoles(**{name: tuple(Role(role) for role in roles) for name, roles in entry["roles"].items()})


def all_defaults(table: str) -> dict[str, Targets]:
    """A table whole: targets by model type. Raises `PeftcError` on an unknown table."""
    return dict(_table(table))


def known_model_types(table: str) -> tuple[str, ...]:
    """Model types that a table knows, sorted. Raises `PeftcError` on an unknown table."""
    return tuple(sorted(_table(table)))


@cache
def _data() -> Mapping[str, Any]:
    text = files("peftc.graph").joinpath("default_targets.json").read_text(encoding="utf-8")
    tables: Mapping[str, Any] = json.loads(text)["tables"]
    return tables


@cache
def _table(name: str) -> Mapping[str, Targets]:
    entry = _data().get(name)
    targets: Mapping[str, Targets] = _entry(name)["targets"]
    return {**targets, **entry["but"]} if isinstance(entry, Mapping) and "but" in entry else targets


def _entry(name: str) -> Mapping[str, Any]:
    """The table that has the data: the one of this name, or the one that it is like."""
    entry = _data().get(name)
    if entry is None:
        fix = did_you_mean(name, _data()) or f"Tables are {', '.join(_data())}."
        raise PeftcError(rules.PLUGIN_INVALID(f"There is no table of default targets `{name}`", fix=fix))
    if isinstance(entry, str):
        return _entry(entry)
    found: Mapping[str, Any] = _entry(entry["like"]) if "like" in entry else entry
    return found
