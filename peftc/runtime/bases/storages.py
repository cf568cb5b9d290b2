"""Which storage a live layer's weight is in, and what is known of it without opening it."""

from __future__ import annotations

from torch import nn

from peftc.graph.nodes import ModuleGraph, Packed
from peftc.registry.boundary import boundary
from peftc.registry.storages import default_storages
from peftc.runtime.journal import keep_entry
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
    for module in model.modules():
        storage = storage_of(module)
        if storage is None:
            continue
        with boundary(f"the storage `{storage.name}`", "settings"):
            wanted = storage.settings(module)
        for name, value in wanted.items():
            own = module._parameters if isinstance(value, nn.Parameter) else module.__dict__
            keep_entry(own, name)
            own[name] = value
