"""From a graph and adapters' configs to an `InjectionPlan`: every problem of every adapter is found before any is raised."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from peftc import rules
from peftc.compiler.passes.calls import weighed
from peftc.compiler.passes.draft import Context, Draft, Options, listed, placed
from peftc.compiler.passes.modules import together
from peftc.compiler.passes.order import run_passes
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import PeftConfig
from peftc.config.mixins import ReplicationMixin
from peftc.config.places import json_path
from peftc.diagnostics import Collector, Diagnostic, NoMatchingPeftModuleError, PeftcError, did_you_mean
from peftc.graph.nodes import ModuleGraph
from peftc.graph.replicas import replicated
from peftc.graph.replication import REPLICATION_OPTION, Ranges
from peftc.registry.boundary import boundary
from peftc.registry.manager import Registry, default_registry
from peftc.registry.starts import start_problems


def compile_plan(
    graph: ModuleGraph,
    adapters: Mapping[str, PeftConfig],
    *,
    active: Sequence[str] | None = None,
    strict: bool = False,
    allow_dead: Collection[str] = (),
    registry: Registry | None = None,
    autocast_adapter_dtype: bool = True,
    task_heads: bool = True,
    given: Collection[str] | None = None,
    mixed: bool = False,
    loading: bool = False,
) -> InjectionPlan:
    """Plan the adapters, by name, on a model. Configs are not changed; the plan has validated, resolved copies.

    `active` defaults to the first adapter. With `strict` an entry without effect (a target, an exclusion, a pattern key, a
    layer index, a module to save) is an error, otherwise a warning, and neither if it is in `allow_dead`.
    `autocast_adapter_dtype` lifts half-precision slots to float32. Without `task_heads` a task type adds no head to
    `modules_to_save`, as when a model is adapted in place. `given` are the paths to adapt where they are known exactly, for
    example from a checkpoint's keys: they count, and a config that means others is warned of.
    `mixed` allows adapters of several methods. With `loading` adapters get the storage of what is saved of them, where that
    is less than what they are trained with, and options that say how a fresh one begins are not judged.

    Raises `PeftcError` with all problems of all adapters; warnings of a plan that was made are in `plan.warnings`.
    """
    found = Collector()
    registry = registry or default_registry()
    graph, problems = laid_out(graph, adapters)
    found.add(*problems, *_without_layers(adapters))
    exactly = None if given is None else frozenset(given)
    options = Options(strict, frozenset(allow_dead), autocast_adapter_dtype, task_heads, exactly, loading)
    plans = []
    for name, config in adapters.items():
        draft = draft_adapter(graph, name, config, registry, options)
        drafting = partial(draft_adapter, graph, registry=registry, options=replace(options, loading=True, given=None))
        draft, needed = weighed(graph, name, draft, registry, autocast_adapter_dtype, drafting)
        found.add(*draft.problems)
        plans += [frozen(name, draft), *needed]
    found.add(*conflicts(plans, mixed, registry))
    chosen = tuple(adapters)[:1] if active is None else tuple(active)
    found.add(*(_unknown_active(name, adapters) for name in chosen if name not in adapters))
    chosen += tuple(plan.name for plan in plans if plan.needed_by in chosen and plan.needed_by)
    found.add(
        *together(
            [plan for plan in plans if plan.name in chosen],
            lambda plan, site: site.tuner(registry.method_of(plan.config), plan.config, graph),
        )
    )
    nothing = any(problem.code == rules.NO_MATCH.code for problem in found.errors)
    found.raise_errors(NoMatchingPeftModuleError if nothing else PeftcError)
    return InjectionPlan(graph.model, tuple(plans), chosen, graph.numel, found.warnings, graph)


def laid_out(graph: ModuleGraph, adapters: Mapping[str, PeftConfig]) -> tuple[ModuleGraph, tuple[Diagnostic, ...]]:
    """The graph of the model with the layers that adapters ask for, and what keeps it from having them. One that has been
    given other layers already stays as it is."""
    for name, config in adapters.items():
        ranges = replication_of(config)
        have = graph.replication
        try:
            if have is not None and [*have.sources] != [i for start, end in ranges for i in range(start, end)]:
                what = f"The model's layers are replicated, and not as `{name}` says in `{REPLICATION_OPTION}`"
                fix = f"Give all adapters on a model the same `{REPLICATION_OPTION}`, or take those that are on it off first."
                return graph, (rules.ADAPTERS_CONFLICT(what, fix=fix, where=f"$.adapters.{name}.{REPLICATION_OPTION}"),)
            if ranges and have is None:
                return replicated(graph, ranges), ()
        except PeftcError as error:
            return graph, tuple(placed(problem, name, config) for problem in error.diagnostics)
    return graph, ()


def _without_layers(adapters: Mapping[str, PeftConfig]) -> Iterator[Diagnostic]:
    for name, config in adapters.items():
        if isinstance(config, ReplicationMixin) and config.layer_replication == []:
            what = f"`{REPLICATION_OPTION}` is empty, so that the layers stay as they are"
            where = f"$.adapters.{name}.{REPLICATION_OPTION}"
            yield rules.WITHOUT_EFFECT(what, fix="Name ranges of layers, or leave the option out.", where=where)


def replication_of(config: PeftConfig) -> Ranges:
    """The layers that an adapter asks for; empty if it takes them as they are."""
    return config.layer_replication or () if isinstance(config, ReplicationMixin) else ()


def draft_adapter(graph: ModuleGraph, name: str, config: PeftConfig, registry: Registry, options: Options) -> Draft:
    """One adapter after all passes, with its problems; nothing is raised."""
    try:
        start, context = begin(graph, name, config, registry, options)
    except PeftcError as error:
        return Draft(config).failed(error)
    return run_passes(start, context)


def begin(
    graph: ModuleGraph, name: str, config: PeftConfig, registry: Registry, options: Options
) -> tuple[Draft, Context]:
    """The draft and context that the passes start from. Raises `PeftcError` on a config or a method that cannot be used."""
    if not config.peft_type:
        known = ", ".join(registry.names)
        what = f"The config of `{name}` has no `peft_type`"
        raise PeftcError(rules.NO_TYPE(what, fix=f"Use a method's own config; installed are {known}.", where=name))
    copy = config.revalidated()
    place = json_path(("adapters", name))
    try:
        method = registry.method_of(config)
    except PeftcError as error:
        raise PeftcError([placed(problem, name, copy) for problem in error.diagnostics]) from error
    with boundary(method.peft_type, "check", place):
        said = tuple(method.problems(copy))
    with boundary(method.peft_type, "check_start", place):
        said += () if options.loading else tuple(method.check_start(copy))
    said += tuple(start_problems(method, copy, options.loading))
    return Draft(copy).told(*(placed(problem, name, copy) for problem in said)), Context(graph, method, name, options)


def frozen(name: str, draft: Draft) -> AdapterPlan:
    """The adapter's part of the plan."""
    config = draft.config
    sites = ((*draft.maps, *draft.rows), draft.saves, draft.trains, draft.prompt, draft.modules, draft.call)
    return AdapterPlan(name, str(config.peft_type), config, *sites, rewrites=draft.rewrites, notes=draft.notes)


def conflicts(
    plans: Sequence[AdapterPlan], mixed: bool = False, registry: Registry | None = None
) -> tuple[Diagnostic, ...]:
    """What keeps these adapters from being on one model together; `mixed` lets methods that act on layers nest."""
    problems: list[Diagnostic] = []
    types = sorted({plan.peft_type for plan in plans if not plan.needed_by})
    if len(types) > 1 and mixed:
        problems += [cannot_mix(plan.peft_type) for plan in plans if not plan.nests]
    elif len(types) > 1:
        what = f"The adapters are of several methods: {', '.join(types)}"
        problems.append(rules.MIXED_TYPES(what, fix="Give each method a model, and a spec, of its own."))
    problems += _unlike(plans, registry or default_registry())
    problems += _laid_out_apart(plans)
    training = [plan.name for plan in plans if plan.trains]
    if training and len(plans) > 1:
        what = f"{listed(training)} trains biases of the base model, which all {len(plans)} adapters would see"
        fix = "Set `bias: none`, or apply the adapter alone."
        problems.append(rules.ADAPTERS_CONFLICT(what, fix=fix, where=f"$.adapters.{training[0]}.bias"))
    copied = {save.path: plan.name for plan in plans for save in plan.saves}
    for plan in plans if copied else ():
        for path, owner in copied.items():
            hit = next((site.path for site in plan.sites if f"{site.path}.".startswith(f"{path}.")), None)
            if hit is not None:
                what = f"`{owner}` trains `{path}` whole while `{plan.name}` adapts `{hit}`"
                fix = "Adapt it, or train it whole, in both."
                problems.append(rules.ADAPTERS_CONFLICT(what, fix=fix, where=hit))
    return tuple(problems)


def _unlike(plans: Sequence[AdapterPlan], registry: Registry) -> Iterator[Diagnostic]:
    """Options that a method's adapters on one model must have in common, and have not."""
    first: dict[str, AdapterPlan] = {}
    for plan in plans:
        other = first.setdefault(plan.peft_type, plan)
        for name in registry.get(plan.peft_type).alike if other is not plan else ():
            own, others = getattr(plan.config, name), getattr(other.config, name)
            if own != others:
                what = f"`{name}` is `{own}` for `{plan.name}` and `{others}` for `{other.name}`"
                why = f"All adapters of {plan.peft_type} on a model have it alike, here and in other libraries."
                fix = f"Give both the same `{name}`, or each a model of its own."
                yield rules.ADAPTERS_CONFLICT(what, why=why, fix=fix, where=f"$.adapters.{plan.name}.{name}")


def _laid_out_apart(plans: Sequence[AdapterPlan]) -> Iterator[Diagnostic]:
    """Adapters for models of different layers."""
    asked = {plan.name: replication_of(plan.config) for plan in plans if not plan.needed_by}
    first = next(iter(asked), "")
    for name, ranges in asked.items():
        if ranges != asked[first]:
            what = f"`{name}` and `{first}` are for models of different layers: `{REPLICATION_OPTION}` is not the same"
            fix = f"Give both the same `{REPLICATION_OPTION}`, or each a model of its own."
            yield rules.ADAPTERS_CONFLICT(what, fix=fix, where=f"$.adapters.{name}.{REPLICATION_OPTION}")


def cannot_mix(peft_type: str) -> Diagnostic:
    """The diagnostic for a method that cannot share a model with another."""
    what = f"`{peft_type}` adapts more than single layers"
    return rules.CANNOT_MIX(what, fix="Put it on a model of its own, made without `mixed=True`.")


def _unknown_active(name: str, adapters: Mapping[str, PeftConfig]) -> Diagnostic:
    fix = did_you_mean(name, adapters) or f"Adapters are {', '.join(f'`{a}`' for a in adapters)}."
    return rules.UNKNOWN_ADAPTER(f"No adapter is called `{name}`, so it cannot be active", fix=fix, where="$.active")
