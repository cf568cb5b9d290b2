"""All doors at once: what a name means, whichever kind of record it is of, and what a module brings."""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

from peftc.registry.door import Door
from peftc.registry.manager import default_registry
from peftc.registry.starts import default_starts
from peftc.registry.storages import default_storages
from peftc.registry.variants import variant_key
from peftc.tuner.method import TunerMethod
from peftc.tuner.start import Start
from peftc.tuner.storage import Storage
from peftc.tuner.variant import Variant

Record: TypeAlias = TunerMethod | Variant[Any] | Start | Storage


def record_of(plugin: str | ModuleType) -> Record:
    """The record of a name: a PEFT type, `<peft type>.<variant>`, a start or a storage; or that of a module, which is registered. Raises
    `PeftcError` as its door does, that of methods where no other knows it."""
    registry = default_registry()
    others: tuple[Door[Any], ...] = (registry.variants, default_starts(), default_storages())
    if isinstance(plugin, ModuleType):
        door = next((door for door in others if door.hook in vars(plugin)), registry)
        brought: Record = door.register(plugin)
        return brought
    if plugin in registry.names:
        return registry.get(plugin)
    door = next((door for door in others if plugin.lower() in door.names), registry)
    found: Record = door.get(plugin if door is registry else plugin.lower())
    return found


def name_of(record: Record) -> str:
    """What it is asked for by."""
    if isinstance(record, (Start, Storage)):
        return record.name
    return variant_key(record.peft_type, record.name) if isinstance(record, Variant) else record.peft_type
