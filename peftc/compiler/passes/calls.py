"""What a method brings that acts around calls: the adapters that it weighs, planned beside its own, and its storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from peftc import rules
from peftc.compiler.passes.draft import Draft, option, placed
from peftc.compiler.passes.sites import all_of, check_form, slot_dtype
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import CallSite
from peftc.config.base import PeftConfig
from peftc.config.files import read_config
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import LINEAR_KINDS, Kind, ModuleGraph
from peftc.graph.replication import REPLICATION_OPTION
from peftc.registry.boundary import boundary
from peftc.registry.manager import Registry
from peftc.tuner.calls import CallTuner

#: Layers whose output has a row for every token.
GATED_KINDS = LINEAR_KINDS | {Kind.EMBEDDING}

#: drafts an adapter by name and config
Drafting = Callable[[str, PeftConfig], Draft]


def weighed(
    graph: ModuleGraph, name: str, draft: Draft, registry: Registry, autocast: bool, drafting: Drafting
) -> tuple[Draft, tuple[AdapterPlan, ...]]:
    """The draft with its storage, and the plans of the adapters that it weighs, frozen unless they train along."""
    if not draft.config.peft_type:
        return draft, ()
    tuner = registry.method_of(draft.config).call_tuner
    if tuner is None:
        return draft, ()
    try:
        method = str(draft.config.peft_type)
        with boundary(method, "resolve"):
            found_out = dict(tuner.resolve(draft.config, graph.model.dims))
        draft = draft.configured(**found_out)
        with boundary(method, "check"):
            said = tuple(tuner.check(draft.config, graph.model.dims))
        draft = draft.told(*(placed(problem, name, draft.config) for problem in said))
        with boundary(method, "needs"):
            needed = dict(tuner.needs(draft.config))
        with boundary(method, "trains_needed"):
            trains = tuner.trains_needed(draft.config)
        plans = []
        for key, origin in needed.items():
            config = read_config(origin)
            config.inference_mode = draft.config.inference_mode
            part = drafting(f"{name}_{key}", config)
            draft = draft.told(*part.problems)
            draft = draft.told(*_ungateable(part, registry, graph, origin))
            plans.append(_needed(f"{name}_{key}", part, name, origin, trains))
        return draft.but(call=_site(graph, draft, tuner, plans, autocast)), tuple(plans)
    except PeftcError as error:
        return draft.failed(error), ()


def _needed(name: str, part: Draft, owner: str, origin: str, trains: bool) -> AdapterPlan:
    known: dict[int, Any] = {}
    maps = []
    for site in part.maps:
        slots = known.setdefault(
            id(site.slots), tuple(replace(s, trainable=s.trainable and trains) for s in site.slots)
        )
        maps.append(replace(site, slots=slots))
    config = part.config
    return AdapterPlan(name, str(config.peft_type), config, tuple(maps), needed_by=owner, origin=origin)


def _ungateable(part: Draft, registry: Registry, graph: ModuleGraph, origin: str) -> Iterator[Diagnostic]:
    fix = "Use adapters that add to the output of linear layers and embeddings."
    beside = _beside_layers(part)
    if beside:
        what = f"The adapter of `{origin}` does more than change layers: it {'; it '.join(beside)}"
        own = "Train it again with adapters on layers alone"
        if part.saves:
            own = (
                "Train the head in the base model, and the adapters without `modules_to_save` and without a `task_type` that "
                "brings one"
            )
        yield rules.CANNOT_GATE(what, fix=f"{own}: only updates of layers can be weighed by token.", where=origin)
    method = registry.method_of(part.config)
    for site in part.maps:
        tuner = site.tuner(method, part.config, graph)
        given = frozenset[str]() if tuner.weighs_siblings else tuner.lowerings
        if not given & {"thin", "rescaled", "branch"} or site.layer.kind not in GATED_KINDS:
            what = f"What the adapter of `{origin}` does to `{site.path}` cannot be weighed by token"
            yield rules.CANNOT_GATE(what, fix=fix, where=site.path)
            return


def _beside_layers(part: Draft) -> list[str]:
    """What an adapter does beside its layers, each as the end of a sentence."""
    task = f" (`task_type: {part.config.task_type}` may bring that)" if part.config.task_type else ""
    found = [f"trains `{save.path}` whole{task}" for save in part.saves]
    found += [f"trains `{train.path}.{train.name}` of the base" for train in part.trains[:1]]
    found += ["replicates layers"] if option(part.config, REPLICATION_OPTION) else []
    found += [f"trains rows of `{site.path}`" for site in part.rows[:1]]
    found += [f"wraps `{site.path}`" for site in part.modules[:1]]
    found += ["goes before the input"] if part.prompt is not None else []
    return [*found, *(["weighs adapters itself"] if part.call is not None else [])]


def _site(
    graph: ModuleGraph, draft: Draft, tuner: CallTuner[Any], plans: list[AdapterPlan], autocast: bool
) -> CallSite:
    adapted = {site.path for plan in plans for site in plan.maps}
    layers = tuple(node.path for node in graph.nodes if node.path in adapted)
    with boundary(str(draft.config.peft_type), "slots"):
        slots = all_of(iter(tuner.slots(draft.config, len(layers))))
    check_form(slots, str(draft.config.peft_type))
    first = next((tensor.dtype for node in graph.nodes for tensor in node.facts.params.values()), "float32")
    needs = tuple(plan.name for plan in plans)
    return CallSite(tuner.owner, slots, slot_dtype(first, autocast), needs, layers)
