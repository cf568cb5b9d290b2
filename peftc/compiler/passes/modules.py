"""The pass for methods that act around whole modules, and which of their adapters cannot act together.

The method chooses the modules, from its options and the graph; what is equal of them is shared between the sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from peftc import rules
from peftc.compiler.passes.draft import Context, Draft, listed, placed
from peftc.compiler.passes.sites import all_of, below, check_slots, slot_dtype
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite, ModuleSite
from peftc.diagnostics import Diagnostic, PeftcError, Severity
from peftc.graph.nodes import ModuleGraph
from peftc.registry.boundary import boundary
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot


def wrap_modules(draft: Draft, context: Context) -> Draft:
    """A module site for every module that the method wraps, after options left out were taken from the model."""
    tuner = context.method.module_tuner
    if tuner is None:
        return draft
    method, graph = context.method.peft_type, context.graph
    try:
        with boundary(method, "resolve"):
            found_out = dict(tuner.resolve(draft.config, graph))
        draft = draft.configured(**found_out)
        with boundary(method, "sites"):
            chosen = dict(tuner.sites(draft.config, graph))
        if context.options.given is not None and context.options.given != chosen.keys():
            what = f"The given paths are {listed(sorted(context.options.given))}, those of the config {listed(chosen)}"
            raise PeftcError(rules.BAD_TARGET(what, fix="Give the config that belongs to the tensors."))
        if any(problem.severity is Severity.ERROR for problem in draft.problems):
            return draft  # what slots would be made from is not all there
        return draft.but(modules=tuple(_sites(draft, context, chosen)))
    except PeftcError as error:
        return draft.told(*(placed(problem, context.name, draft.config) for problem in error.diagnostics))


def _sites(draft: Draft, context: Context, chosen: Mapping[str, str]) -> Iterator[ModuleSite]:
    tuner, graph = context.method.module_tuner, context.graph
    assert tuner is not None
    positions = {node.path: position for position, node in enumerate(graph.nodes)}
    known: list[tuple[Slot, ...]] = []
    for path, reason in chosen.items():
        if not path or path not in positions:
            what = f"`sites` of {context.method.peft_type} names `{path}`, which is no module that can be wrapped"
            raise PeftcError(rules.PLUGIN_INVALID(what, fix="Correct the plugin's `sites`.", where=path))
        node = graph.nodes[positions[path]]
        with boundary(context.method.peft_type, "slots", path):
            slots = all_of(iter(tuner.slots(draft.config, node, graph)))
        check_slots(slots, context, path)
        if slots in known:  # sites that are alike share their slots, which tells them apart from others at no cost
            slots = known[known.index(slots)]
        else:
            known.append(slots)
        dtype = slot_dtype(_weight_dtype(graph, positions[path]), context.options.autocast_adapter_dtype)
        yield ModuleSite(path, node.facts, draft.config, slots, dtype, tuner.inner, reason, node.role)


def _weight_dtype(graph: ModuleGraph, position: int) -> str:
    """The dtype of the first parameter in a module."""
    return next((tensor.dtype for node in below(graph, position) for tensor in node.facts.params.values()), "float32")


#: the mathematics of an adapter at one of its sites; None where it was taken off
TunerOf = Callable[[AdapterPlan, MapSite], MapTuner[Any] | None]


def together(active: Sequence[AdapterPlan], tuner_of: TunerOf) -> Iterable[Diagnostic]:
    """What keeps these adapters from acting at the same time: modules that more than one of them wraps or trains whole, and
    what their method says of two on one layer."""
    for first, second in combinations(active, 2):
        yield from _clashes(first, second, tuner_of)
    wraps: dict[str, list[str]] = {}
    for plan in active:
        for site in plan.modules:
            wraps.setdefault(site.path, []).append(plan.name)
    yield from _trained_twice(active)
    around = [plan.name for plan in active if plan.call is not None]
    if len(around) > 1:
        what = f"{listed(around)} cannot act together: each weighs its adapters in every call"
        yield rules.ADAPTERS_CONFLICT(what, fix="Activate one of them.", where=around[0])
    twice = {path: names for path, names in wraps.items() if len(names) > 1}
    if twice:
        names = dict.fromkeys(name for found in twice.values() for name in found)
        what = f"{listed(names)} cannot act together: each takes the place of {listed(twice)}"
        yield rules.ADAPTERS_CONFLICT(what, fix="Activate one of them.", where=next(iter(twice)))


def _trained_twice(active: Sequence[AdapterPlan]) -> Iterator[Diagnostic]:
    """Modules that more than one adapter trains whole, or within one that another trains whole: one copy would not act."""
    copies = [(save.path, plan.name) for plan in active for save in plan.saves]
    twice: dict[str, tuple[str, str]] = {}
    for (path, first), (other, second) in combinations(copies, 2):
        inside = f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")
        if inside and first != second:
            twice[max(path, other, key=len)] = first, second
    if twice:
        names = dict.fromkeys(name for found in twice.values() for name in found)
        one = "Only one adapter can be set at a time for ModulesToSaveWrapper"
        what = f"{listed(names)} cannot act together: each trains {listed(twice)} whole. {one}"
        yield rules.ADAPTERS_CONFLICT(what, fix="Activate one of them.", where=next(iter(twice)))


def _clashes(first: AdapterPlan, second: AdapterPlan, tuner_of: TunerOf) -> Iterator[Diagnostic]:
    """Layers on which their mathematics does not let two adapters act, by the reason."""
    found: dict[str, list[str]] = {}
    others = {(site.path, site.spot): site.config for site in second.maps}
    for site in first.maps:
        other = others.get((site.path, site.spot))
        alike = first.peft_type == second.peft_type or site.inside
        tuner = tuner_of(first, site) if other is not None and alike else None
        if tuner is not None and other is not None:
            with boundary(first.peft_type, "clash", site.path):
                reason = tuner.clash(site.config, other)
            found.setdefault(reason, []).append(site.path)
    for reason, paths in found.items():
        if reason:
            what = f"`{first.name}` and `{second.name}` cannot act together on {listed(paths)}: {reason}"
            yield rules.ADAPTERS_CONFLICT(what, fix="Activate one of them.", where=paths[0])
