"""Layers without their model: as much of a base as an adapter's arithmetic asks for, with the tensors of one layer at a time.

What is folded in here is folded in by the wrappers that a model would have, so that both come to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.graph.nodes import CONV_KINDS, Kind, LayerFacts, ModuleGraph
from peftc.registry.manager import Registry
from peftc.runtime.applying.apply import SESSION
from peftc.runtime.applying.layer_classes import layer_factory
from peftc.runtime.layer.folding import refuse_waiting
from peftc.runtime.layer.parts import Part
from peftc.runtime.layer.sums import Sums, is_sum
from peftc.runtime.layer.wrapper import Source, TunerLayer
from peftc.runtime.session.session import Session
from peftc.runtime.slots.filling import torch_dtype
from peftc.runtime.slots.stores import Stock

_CONVOLUTIONS = {Kind.CONV1D: nn.Conv1d, Kind.CONV2D: nn.Conv2d, Kind.CONV3D: nn.Conv3d}


class Bare(nn.Module):
    """A module that has parameters and does nothing."""

    def forward(self, x: Any) -> Any:
        raise NotImplementedError("it is not there to be called")


def bare_model(graph: ModuleGraph) -> nn.Module:
    """A model of this graph that nothing was applied to yet, without memory and of its modules the embeddings alone: for what
    is planned, loaded and compared by names and shapes."""
    model = Bare()
    for path in (graph.model.input_embeddings, graph.model.output_embeddings):
        parent: nn.Module = model
        for part in path.split(".") if path else ():
            parent = parent._modules.setdefault(part, Bare()) or parent
        for name, facts in graph.by_path[path].facts.params.items() if path else ():
            tensor = torch.empty(facts.shape, dtype=torch_dtype(facts.dtype), device="meta")
            parent._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    model.__dict__[SESSION] = Session(model, graph)
    return model


def bare_layer(facts: LayerFacts, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module of these facts that has these parameters, and a place for a bias where layers of its kind do."""
    module: nn.Module = Bare()
    if facts.kind in CONV_KINDS:  # whose geometry counts
        made: Any = _CONVOLUTIONS[facts.kind]
        sizes = (facts.in_features, facts.out_features, facts.kernel)
        module = made(*sizes, groups=facts.groups, bias=facts.has_bias, device="meta")
    elif facts.kind is not Kind.EMBEDDING:
        module._parameters["bias"] = None
    for name, tensor in tensors.items():
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return module.eval()


class Folder:
    """Folds one adapter into layers, one after the other, in the order of its plan."""

    def __init__(self, name: str, config: PeftConfig, graph: ModuleGraph, registry: Registry, source: Source) -> None:
        self._name, self._graph, self._source = name, graph, source
        self._method, self._make = registry.method_of(config), layer_factory(registry)
        self._stock = Stock()

    def sums(self, sites: Sequence[MapSite], tensors: Mapping[str, Tensor]) -> tuple[Sums, tuple[Part, ...]] | None:
        """What is added to a layer's weight, row by row, where nothing else becomes of its parameters, and by which adapters;
        else None. Of its `tensors` no number is looked at. Raises `PeftcError`."""
        weight = tensors.get("weight")
        tuners = [(site.tuner(self._method, site.config, self._graph), site.parameter) for site in sites]
        if weight is None or not all(is_sum(tuner, parameter) for tuner, parameter in tuners):
            return None
        with torch.no_grad():
            layer = self._layer(sites, tensors)
            parts = tuple(wrapper.part(self._name).fixed(training=False) for wrapper in layer.chain())
            refuse_waiting(parts)
            sums = Sums.of(parts, layer.backend.to_logical("weight", weight), weight.dtype)
        return None if sums is None else (sums, parts)

    def folded(self, sites: Sequence[MapSite], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What becomes of a layer's parameters, those that change, by name. `sites` are all of the layer's, its `tensors` in
        the base's number formats. Raises `PeftcError` for a change that has no place in them, or is not finite."""
        with torch.no_grad():
            layer = self._layer(sites, tensors)
            changed = layer.merged_parameters([self._name], check=True)
        layer.get_base_layer()._parameters.clear()  # wrappers and their views go when the collector comes by, the weights at once
        return {name: parameter.detach() for name, parameter in changed.items()}

    def _layer(self, sites: Sequence[MapSite], tensors: Mapping[str, Tensor]) -> TunerLayer:
        layer = bare_layer(self._graph.by_path[sites[0].path].facts, tensors)
        for site in sites:
            layer = self._make(self._method.peft_type, site, layer)
            tuner = site.tuner(self._method, site.config, self._graph)
            layer.add(self._name, site, tuner, self._source, self._stock)
        assert isinstance(layer, TunerLayer)
        return layer
