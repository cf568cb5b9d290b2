"""Replicas of layers in a live model: blocks that share the weights of others, and the way back to the model's own stack.

A layer stays itself where it comes first; where it comes again there is a copy with the same parameters. The model's config,
and the index by which each layer finds its part of a cache, say what there is. A merged model's layers share nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.graph.replication import REPLICATION_OPTION, Replication
from peftc.host.offload import hook_of
from peftc.runtime.journal import keep_entry, keep_memory, note

#: The attributes by which a layer's modules know its index.
_INDICES = ("layer_idx", "layer_id")
#: Options of configs that have an entry for each layer.
_BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type")


class Stack:
    """A model's own list of layers, which another stands in for, and what else was as it was."""

    def __init__(self, model: nn.Module, parent: nn.Module, name: str, own: nn.Module, sources: Sequence[int]) -> None:
        self._model, self._parent, self._name, self._own = (model,), (parent,), name, (own,)  # no children of anything
        self._sources = sources
        self._indices = [(module, name, module.__dict__[name]) for module, name in _indexed(own)]
        self._options: list[tuple[Any, str, Any]] = []
        self._placed = _placed(own)

    def set_option(self, config: Any, name: str, value: Any) -> None:
        """Change an option of a config, and know what it was."""
        before = getattr(config, name)
        self._options.append((config, name, before))
        note(setattr, config, name, before)
        setattr(config, name, value)

    def put_back(self) -> None:
        """Have everything as it was, where the model is now and in what it has been cast to."""
        (parent,), (own,), (model,) = self._parent, self._own, self._model
        there = parent._modules[self._name]
        assert there is not None
        self._follow(own, there)
        keep_entry(parent._modules, self._name)
        parent._modules[self._name] = own
        own.train(model.training)
        for module, attribute, index in self._indices:
            _set_index(module, attribute, index)
        for config, name, value in reversed(self._options):
            note(setattr, config, name, getattr(config, name))
            setattr(config, name, value)

    def part(self) -> None:
        """Give each replica tensors of its own, for good. The adapters must be off the model.

        A saved model has each layer's tensors, and whoever loads it has so many layers that share nothing; transformers does
        not save others.
        """
        (parent,) = self._parent
        held: set[int] = set()
        for index, block in enumerate(parent.get_submodule(self._name).children()):
            if self._sources[index] in self._sources[:index]:
                _own_parameters(block, held)
            held.update(map(id, block.parameters()))

    def _follow(self, own: nn.Module, there: nn.Module) -> None:
        """Let layers that were left out go where the others went, and be cast as they were."""
        (device, dtype), (was_on, was) = _placed(there), self._placed
        if (device, dtype) == (was_on, was):
            return
        moved = {id(tensor) for tensor in (*there.parameters(), *there.buffers())}
        for tensor in (*own.parameters(), *own.buffers()):
            if id(tensor) not in moved and not tensor.is_meta and tensor.device == was_on:
                keep_memory(tensor)
                tensor.data = tensor.data.to(device, dtype if tensor.dtype == was else tensor.dtype)


def _placed(layers: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a stack is, and in what."""
    first = next((p for p in layers.parameters() if p.is_floating_point()), torch.empty(0))
    return first.device, first.dtype


def replicate(model: nn.Module, replication: Replication) -> Stack:
    """Give a model, without adapters, the layers of a replication, to be undone by what is returned.

    Raises `PeftcError` for layers whose weights are elsewhere.
    """
    head, _, name = replication.stack.rpartition(".")
    parent = model.get_submodule(head)
    own = parent.get_submodule(name)
    if any(hook_of(module) is not None for module in own.modules()):
        what = f"Weights of `{replication.stack}` are not in memory, so that layers cannot share them"
        fix = f"Load the base without offloading, or leave `{REPLICATION_OPTION}` out."
        raise PeftcError(rules.NO_REPLICATION(what, fix=fix, where=REPLICATION_OPTION))
    stack = Stack(model, parent, name, own, replication.sources)
    made: list[nn.Module] = []
    for index, source in enumerate(replication.sources):
        block = own.get_submodule(str(source))
        block = _twin(block) if source in replication.sources[:index] else block
        made.append(block)
    for index, block in enumerate(made):
        for module, attribute in _indexed(block):
            _set_index(module, attribute, index)
    layers = nn.ModuleList(made)
    layers.training = own.training
    keep_entry(parent._modules, name)
    parent._modules[name] = layers
    for config in _configs(model, replication):
        for option in _BY_LAYER:
            entries = getattr(config, option, None)
            if isinstance(entries, (list, tuple)) and len(entries) == replication.count:
                stack.set_option(config, option, type(entries)(entries[source] for source in replication.sources))
        stack.set_option(config, "num_hidden_layers", len(made))
    return stack


def _twin(block: nn.Module) -> nn.Module:
    """A copy with the same parameters and the same config."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in block.parameters()}
    for module in block.modules():
        config = module.__dict__.get("config")
        if config is not None:
            shared[id(config)] = config
    return copy.deepcopy(block, shared)


def _own_parameters(block: nn.Module, others: Collection[int]) -> None:
    """Copy the parameters of a block that others have as well; those that are one in the block stay one."""
    made: dict[int, Any] = {}
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in others:
                keep_entry(module._parameters, name)
                module._parameters[name] = copy.deepcopy(parameter, made)


def _indexed(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules that know the index of their layer, and what they call it."""
    return [(module, name) for module in block.modules() for name in _INDICES if name in module.__dict__]


def _set_index(module: nn.Module, attribute: str, index: int) -> None:
    keep_entry(module.__dict__, attribute)
    module.__dict__[attribute] = index


def _configs(model: nn.Module, replication: Replication) -> Iterator[Any]:
    """The configs on the way to the stack that say how many layers it has."""
    way, module = [model], model
    for part in replication.stack.split(".")[:-1]:
        module = module.get_submodule(part)
        way.append(module)
    found = {id(config): config for module in way if (config := module.__dict__.get("config")) is not None}
    yield from (c for c in found.values() if getattr(c, "num_hidden_layers", None) == replication.count)
