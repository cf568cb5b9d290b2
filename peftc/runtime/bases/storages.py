"""Which storage a live layer's weight is in, and what is known of it without opening it."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from peftc.graph.nodes import ModuleGraph, Packed
from peftc.registry.boundary import boundary
from peftc.registry.storages import default_storages
from peftc.runtime.journal import keep_entries, keep_entry
from peftc.tuner.storage import Storage


def storage_of(layer: nn.Module) -> Storage | None:
    """How a layer's weight is stored; None where it is a plain tensor. A layer that is not packed yet counts as plain."""
    weight = layer._parameters.get("weight")
    fitting = default_storages().of_class(type(layer), None if weight is None else type(weight))
    return next((storage for storage in fitting if storage.holds(layer)), None)


def packed_facts(layer: nn.Module) -> Packed | None:
    """The same with sizes, dtype and bytes. Raises `PeftcError` naming a storage that fails."""
    storage = storage_of(layer)
    if storage is None:
        return None
    with boundary(f"the storage `{storage.name}`", "facts"):
        return storage.facts(layer)


def settle(model: nn.Module, graph: ModuleGraph) -> None:
    """Let the packed layers of a model, adapted or not, be as they have to be while adapters are on it."""
    if not any(node.facts.packed for node in graph.nodes):
        return
    openers: set[str] = set()
    for module in model.modules():
        storage = storage_of(module)
        if storage is None:
            continue
        openers.update(storage.openers)
        with boundary(f"the storage `{storage.name}`", "settings"):
            wanted = storage.settings(module)
        for name, value in wanted.items():
            own = module._parameters if isinstance(value, nn.Parameter) else module.__dict__
            keep_entry(own, name)
            own[name] = value
    if openers:
        _stop(model, openers)


def _stop(model: nn.Module, openers: Set[str]) -> None:
    """Have functions of these names not be called before modules of a model any more."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        unwanted = [key for key, hook in hooks.items() if _name(hook) in openers]
        if unwanted:
            keep_entries(hooks)
        for key in unwanted:
            del hooks[key]


def _name(hook: object) -> str:
    return f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', '')}"
