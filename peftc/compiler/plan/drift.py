"""How a model differs from the one that a plan was made for, as far as the plan depends on it.

Equal digests settle it. Otherwise every place that the plan names is compared, so that a refusal says what is different.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.render import shape_of
from peftc.diagnostics import Diagnostic
from peftc.graph.groups import grouped
from peftc.graph.nodes import LayerFacts, ModuleGraph
from peftc.graph.tensors import TensorFacts

_FIX = "Apply the plan to the model it was made for, or plan again with `peftc plan`."


def differences(plan: InjectionPlan, graph: ModuleGraph) -> tuple[Diagnostic, ...]:
    """What keeps the plan from being applied to a model of this graph; empty if nothing does."""
    if plan.graph_digest == graph.digest:
        return ()
    found = [f"The model is a {graph.model.cls}, not a {plan.model.cls}"] if graph.model.cls != plan.model.cls else []
    for adapter in plan.adapters:
        found += _grouped(_places(adapter, graph))
    if graph.numel != plan.base_numel:
        found.append(f"The model has {graph.numel:,} parameters, not {plan.base_numel:,}")
    return tuple(rules.PLAN_DRIFTED(what, fix=_FIX) for what in found)


def _grouped(places: Iterator[tuple[str, str]]) -> list[str]:
    """Differences that repeated layers share, told once."""
    return [group.tag.format(f"`{group.pattern}`") for group in grouped(places)]


def _places(adapter: AdapterPlan, graph: ModuleGraph) -> Iterator[tuple[str, str]]:
    for site in adapter.sites:
        node = graph.by_path.get(site.path)
        if node is None:
            yield site.path, "There is no {}"
        elif node.facts != site.layer:
            yield site.path, "{} " + _changed(site.layer, node.facts)
    tensors = dict(_all_tensors(graph))
    for save in adapter.saves:
        for tail, facts in save.tensors:
            yield from _tensor(f"{save.path}.{tail}", facts, tensors)
    for train in adapter.trains:
        yield from _tensor(f"{train.path}.{train.name}" if train.path else train.name, train.tensor, tensors)
    if adapter.prompt is not None and graph.model.input_embeddings != adapter.prompt.embeddings:
        yield adapter.prompt.embeddings, f"The input embeddings are `{graph.model.input_embeddings}`, not {{}}"


def _changed(planned: LayerFacts, found: LayerFacts) -> str:
    if found.cls != planned.cls or found.kind is not planned.kind:
        return f"is a {found.cls}, not a {planned.cls}"
    if shape_of(found) != shape_of(planned):
        return f"maps {shape_of(found)}, not {shape_of(planned)}"
    return f"holds {_contents(found)}, not {_contents(planned)}"


def _contents(facts: LayerFacts) -> str:
    return (
        ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in (*facts.params.items(), *facts.buffers.items()))
        or "nothing"
    )


def _all_tensors(graph: ModuleGraph) -> Iterator[tuple[str, TensorFacts]]:
    for node in graph.nodes:
        for name, facts in node.facts.params.items():
            yield (f"{node.path}.{name}" if node.path else name), facts


def _tensor(name: str, planned: TensorFacts, tensors: dict[str, TensorFacts]) -> Iterator[tuple[str, str]]:
    found = tensors.get(name)
    if found is None:
        yield name, "There is no {}"
    elif found != planned:
        yield name, f"{{}} is {list(found.shape)} {found.dtype}, not {list(planned.shape)} {planned.dtype}"
