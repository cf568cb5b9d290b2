"""Attention of torch, whose projections are parameters of its own and a layer that it reads without calling: as a target it
stands for all of them. And where layers are in memory that are inside of a module with wrappers of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from peftc.compiler.passes.draft import Context, Draft
from peftc.compiler.plan.sites import MapSite
from peftc.graph.nodes import Kind, LayerFacts, ModuleNode

#: The layer of an attention that its output goes through.
_OUTPUT = "out_proj"


def spread(draft: Draft, context: Context) -> Draft:
    """Targets that are attention become its weights and its output layer, with the options in force there. Methods that
    cannot adapt these say so of the target itself."""
    nodes = context.graph.by_path
    meant = [path for path in draft.targets if nodes[path].facts.kind is Kind.ATTENTION]
    if not meant or Kind.ATTENTION not in context.method.supports:
        return draft
    targets: dict[str, tuple[str, ...]] = {}
    parameters, overrides = dict(draft.parameters), dict(draft.overrides)
    for path, entries in draft.targets.items():
        if path not in meant:
            targets[path] = entries
            continue
        output = f"{path}.{_OUTPUT}"
        parts = [output, *(f"{path}.{name}" for name in weights_of(nodes[path]))]
        targets[output] = draft.targets.get(output, entries)
        for name in weights_of(nodes[path]):
            parameters.setdefault((path, name), entries[0])
        for part in parts if path in overrides else ():
            overrides.setdefault(part, overrides[path])
    return draft.but(targets=targets, parameters=parameters, overrides=overrides)


def nodes_of(draft: Draft, context: Context) -> Mapping[str, ModuleNode]:
    """The graph's modules by path. The output layer of an attention that is adapted has facts that say so, by the class."""
    nodes = context.graph.by_path
    owners = {path for path, _ in draft.parameters if nodes[path].facts.kind is Kind.ATTENTION}
    parts: dict[str, ModuleNode] = {}
    known: dict[int, LayerFacts] = {}
    for owner in owners:
        node, cls = nodes.get(f"{owner}.{_OUTPUT}"), nodes[owner].facts.cls
        if node is not None:
            facts = known.setdefault(id(node.facts), replace(node.facts, cls=cls))
            parts[node.path] = replace(node, facts=facts)
    return {**nodes, **parts} if parts else nodes


def weights_of(node: ModuleNode) -> list[str]:
    """The matrices among an attention's own parameters: one of queries, keys and values together, or one of each."""
    return [name for name, tensor in node.facts.params.items() if name.endswith("_weight") and len(tensor.shape) == 2]


def placed(maps: Sequence[MapSite]) -> tuple[MapSite, ...]:
    """Sites that know where they are under wrappers of the adapter that are round modules around them."""
    wrappers = wrappers_of(maps)
    if not wrappers:
        return tuple(maps)
    return tuple(replace(site, place=place_of(site.path, wrappers)) for site in maps)


def wrappers_of(maps: Sequence[MapSite]) -> Mapping[str, int]:
    """How many wrappers there are round each module of which single parameters are adapted."""
    return Counter(site.path for site in maps if site.parameter)


def place_of(path: str, wrappers: Mapping[str, int]) -> str:
    """A path with the wrappers round the modules on it; empty if there are none.

    >>> place_of("block.attn.out_proj", {"block.attn": 1})
    'block.attn.base_layer.out_proj'
    """
    *above, name = path.split(".")
    place: list[str] = []
    for end, part in enumerate(above, start=1):
        place += [part, *["base_layer"] * wrappers.get(".".join(above[:end]), 0)]
    return ".".join([*place, name]) if len(place) > len(above) else ""
