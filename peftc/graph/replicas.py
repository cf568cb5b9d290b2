"""A model's graph with some of its layers repeated: where the stack is, what the layers are then, which parameters are one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import ModuleGraph, ModuleNode
from peftc.graph.replication import REPLICATION_OPTION, Ranges, Replication

#: Levels that models have round their stack, and what that is called, as the reference looks for it.
_LEVELS = ("model", "bert")
_STACKS = ("layers", "encoder.layer", "h")


def replicated(graph: ModuleGraph, ranges: Ranges) -> ModuleGraph:
    """The graph of a model whose stack has the layers of these ranges, one after the other.

    Raises `PeftcError` if the model has no such layers, or no stack that could be found.
    """
    problems = list(_problems(graph, ranges))
    if problems:
        raise PeftcError(problems)
    stack = stack_of(graph)
    assert stack is not None
    sources = tuple(index for start, end in ranges for index in range(start, end))
    done = Replication(stack, len(_blocks(graph, stack)), sources)
    nodes = tuple(_nodes(graph, done))
    dims = dict(graph.model.dims)
    if dims.get("num_hidden_layers") == done.count:
        dims["num_hidden_layers"] = len(sources)
    model = replace(graph.model, dims=dims)
    return replace(graph, model=model, nodes=nodes, ties=tuple(_ties(graph, nodes, done)), replication=done)


def stack_of(graph: ModuleGraph) -> str | None:
    """The path of the model's list of layers; None if it has none, or several that are not called as usual."""
    lists = {node.path for node in graph.nodes if node.facts.cls == "ModuleList"}
    level = ""
    while inner := next((f"{level}{name}." for name in _LEVELS if f"{level}{name}" in graph.by_path), ""):
        level = inner
    usual = next((path for name in _STACKS if (path := f"{level}{name}") in lists), None)
    if usual is not None:
        return usual
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return outermost[0] if len(outermost) == 1 else None


def _problems(graph: ModuleGraph, ranges: Ranges) -> Iterator[Diagnostic]:
    stack = stack_of(graph)
    if stack is None:
        what = f"Could not locate the layers of this {graph.model.cls}: it has no list of them, or several"
        yield rules.NO_REPLICATION(what, fix=f"Leave `{REPLICATION_OPTION}` out.", where=REPLICATION_OPTION)
        return
    count = len(_blocks(graph, stack))
    beyond = [list(span) for span in ranges if span[1] > count]
    if beyond:
        what = f"`{stack}` has the layers 0 to {count - 1}, and `{REPLICATION_OPTION}` has the range {beyond[0]}"
        fix = f"Let ranges end at {count} or before: the end of a range is not in it."
        yield rules.NO_REPLICATION(what, fix=fix, where=REPLICATION_OPTION)


def _blocks(graph: ModuleGraph, stack: str) -> dict[int, list[ModuleNode]]:
    """The nodes of each layer, by its index."""
    found: dict[int, list[ModuleNode]] = {}
    for node in graph.nodes:
        if node.path.startswith(f"{stack}."):
            index = node.path.removeprefix(f"{stack}.").partition(".")[0]
            if index.isdigit():
                found.setdefault(int(index), []).append(node)
    return found


def _nodes(graph: ModuleGraph, done: Replication) -> Iterator[ModuleNode]:
    blocks = _blocks(graph, done.stack)
    inside = {node.path for block in blocks.values() for node in block}
    for node in graph.nodes:
        if node.path in inside:
            continue
        yield node
        if node.path == done.stack:
            for index, source in enumerate(done.sources):
                start = f"{done.stack}.{source}"
                for own in blocks[source]:
                    path = f"{done.stack}.{index}{own.path.removeprefix(start)}"
                    yield replace(own, path=path, block=(done.stack, index))


def _ties(graph: ModuleGraph, nodes: Sequence[ModuleNode], done: Replication) -> Iterator[tuple[str, ...]]:
    """Parameters that are one, in the order in which they are met."""
    groups: dict[str, list[str]] = {}
    for node in nodes:
        for name in node.facts.params:
            full = f"{node.path}.{name}" if node.path else name
            origin = done.origin(full)
            groups.setdefault(graph.alias_of.get(origin, origin), []).append(full)
    return (tuple(names) for names in groups.values() if len(names) > 1)


def own_ties(graph: ModuleGraph) -> tuple[tuple[str, ...], ...]:
    """The groups of parameters that are one in the model itself, and not because a layer is a replica of another."""
    replication = graph.replication
    if replication is None:
        return graph.ties
    return tuple(group for group in graph.ties if len({replication.origin(name) for name in group}) > 1)
