"""Dropouts of adapters: modules in the model under the ecosystem's names, which others look for, hook and switch off."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peftc.runtime.journal import keep_entries, keep_entry
from peftc.runtime.layer.parts import Part


def dropout_of(layer: nn.Module, name: str, adapter: str, p: float) -> nn.Module | None:
    """What drops an adapter's inputs in training, made on first use; None if it drops none."""
    if p <= 0:
        return None
    container = _container(layer, name)
    if not isinstance(container._modules.get(adapter), nn.Dropout):
        keep_entry(container._modules, adapter)
        made = container._modules[adapter] = nn.Dropout(p)
        made.training = layer.training
    return container._modules[adapter]


def found(layer: nn.Module, adapter: str) -> nn.Module | None:
    """An adapter's dropout, or what does nothing in its place, if somebody has asked for it."""
    container = layer._modules.get(str(layer.dropout_name))
    return None if container is None else container._modules.get(adapter)


def drop_dropout(layer: nn.Module, name: str, adapter: str) -> None:
    """Remove an adapter's."""
    container = layer._modules.get(name)
    if container is not None:
        keep_entries(container._modules)
        container._modules.pop(adapter, None)


def all_dropouts(layer: nn.Module, name: str, parts: Mapping[str, Part]) -> nn.ModuleDict:
    """Those of all adapters; one that drops nothing gets a module that does nothing, for others to hook."""
    container = _container(layer, name)
    for adapter in parts:
        keep_entry(container._modules, adapter)
        container._modules.setdefault(adapter, nn.Identity())
    return container


def _container(layer: nn.Module, name: str) -> nn.ModuleDict:
    container = layer._modules.get(name)
    if container is None:
        keep_entry(layer._modules, name)
        container = layer._modules[name] = nn.ModuleDict()
    assert isinstance(container, nn.ModuleDict)
    return container
