"""Parameters of today that were layers before a library fused them, and what targets mean of each by their former names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from peftc.graph.former import EXPERT, FormerLayers
from peftc.graph.nodes import ModuleGraph, ModuleNode, Role

#: Path of a module, or of a former layer -> the entries that mean it.
Find = Callable[[str], tuple[str, ...]]

#: Dimensions of a parameter that holds the weights of several experts.
_EXPERT_DIMENSIONS = 3


@dataclass(frozen=True, slots=True)
class Meaning:
    """What targets mean of a parameter: the entries, the names of those of its layers that they leave out, and whether they
    mean some experts and not others."""

    entries: tuple[str, ...]
    missing: tuple[str, ...] = ()
    uneven: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is meant as a whole."""
        return bool(self.entries) and not self.missing and not self.uneven


@dataclass(frozen=True, slots=True)
class FormerTarget:
    """A parameter that was linear layers: `layers` are their paths, in the order of their rows, with `{expert}` for the
    experts' index. Without layers it was never anything else, and no name of a layer means it."""

    module: str
    parameter: str
    layers: tuple[str, ...]
    experts: int = 0
    meaning: Meaning = Meaning(())

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module}.{self.parameter}"

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' own names, such as `("w1", "w3")`."""
        return tuple(layer.rpartition(".")[2] for layer in self.layers)

    def example(self, part: int) -> tuple[str, ...]:
        """Paths that mean a layer, of the first expert where there are several."""
        return (*self._general(part), *self._of_expert(part, 0))

    def meant(self, find: Find, every_expert: bool) -> Meaning:
        """What is meant of it. Without `every_expert` no entry tells experts apart."""
        parts = [self._part(find, part, every_expert) for part in range(len(self.layers))]
        entries = tuple(dict.fromkeys(entry for found, _ in parts for entry in found))
        missing = tuple(name for name, (found, _) in zip(self.names, parts, strict=True) if not found)
        return Meaning(entries, missing if entries else (), any(uneven for _, uneven in parts))

    def excluded(self, find: Find, every_expert: bool) -> Meaning:
        """What exclusions mean of it: the module that has it counts as well, and the parameter."""
        entries = find(self.path) or find(self.module)
        return Meaning(entries) if entries else self.meant(find, every_expert)

    def _part(self, find: Find, part: int, every_expert: bool) -> tuple[tuple[str, ...], bool]:
        for path in self._general(part):
            entries = find(path)
            if entries:
                return entries, False
        indices = range(self.experts if every_expert else min(self.experts, 1))
        found = [next((e for path in self._of_expert(part, i) if (e := find(path))), ()) for i in indices]
        entries = next((entries for entries in found if entries), ())
        return entries, bool(entries) and not all(found)

    def _general(self, part: int) -> Iterator[str]:
        layer = self.layers[part]
        if EXPERT in layer:
            yield f"{self.module}.{layer.rpartition('.')[2]}"
        else:
            yield self.module
            yield layer

    def _of_expert(self, part: int, index: int) -> Iterator[str]:
        layer = self.layers[part]
        if EXPERT in layer:
            yield layer.replace(EXPERT, str(index))
            yield f"{self.module}.{index}.{layer.rpartition('.')[2]}"


def former_targets(graph: ModuleGraph) -> Iterator[FormerTarget]:
    """Parameters of the model that were layers, or are weights of experts or routers, in the model's order."""
    for node in graph.nodes:
        if node.is_router:
            former = next((f.layers[0] for f in graph.former_names.of(node.path) if not f.of_experts), node.path)
            yield FormerTarget(node.path, "weight", (former,))
        elif node.role is Role.EXPERT or graph.former:
            yield from _of_experts(node, graph.former_names.of(node.path))


def _of_experts(node: ModuleNode, former: Iterable[FormerLayers]) -> Iterator[FormerTarget]:
    layers = {f.parameter: f.layers for f in former if f.of_experts}
    for name, tensor in node.facts.params.items():
        if len(tensor.shape) == _EXPERT_DIMENSIONS and (name in layers or node.role is Role.EXPERT):
            yield FormerTarget(node.path, name, layers.get(name, ()), tensor.shape[0])


def former_paths(graph: ModuleGraph) -> Iterator[str]:
    """Paths that layers had before they were fused or became routers, of the first expert where there are several."""
    for target in former_targets(graph):
        for part in range(len(target.layers)):
            yield from (path for path in target.example(part) if path != target.module)
