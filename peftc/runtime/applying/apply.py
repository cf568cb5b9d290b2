"""Carry a plan out on a model. Nothing is decided here, and any failure leaves the model exactly as it was."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peftc import rules
from peftc.compiler.compile import laid_out
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.drift import differences
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import ModuleGraph
from peftc.limits import MAX_NAME
from peftc.registry.manager import Registry, default_registry
from peftc.runtime.applying.layer_classes import layer_factory
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.bases.storages import settle
from peftc.runtime.journal import keep, keep_trained, whole
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.session.session import Session

SESSION = "_peftc_session"

#: adapter name -> where its tensors come from
Sources = Mapping[str, Source]


def session_of(model: nn.Module) -> Session | None:
    """The session kept on a base model, if adapters were applied to it."""
    session = model.__dict__.get(SESSION)
    return session if isinstance(session, Session) else None


@whole
def apply_plan(
    model: nn.Module,
    plan: InjectionPlan,
    *,
    registry: Registry | None = None,
    sources: Sources | None = None,
    mixed: bool = False,
    trains: bool | None = None,
) -> Session:
    """Put the plan's adapters on layers of the model, in place, and activate those that the plan says. Where `mixed`, those
    of another method than the last go round its wrappers; otherwise they are refused.

    Base parameters are frozen; the active adapters train if `trains`, or if one of them is not for inference. `sources` gives tensors from checkpoints; what it lacks is initialised by the method.
    Raises `PeftcError` with every difference if the model is not the one that the plan was made for.
    """
    registry = registry or default_registry()
    session = session_of(model)
    graph = plan.graph or _live_graph(model, plan, session)
    drifted = differences(plan, graph) if plan.graph is None else ()
    if drifted:
        raise PeftcError(drifted)
    if session is None:
        session = Session(model, graph)
        freeze(model)
        settle(model, graph)
        keep(model)
        model.__dict__[SESSION] = session
    session.lay_out(graph)
    make = layer_factory(registry)
    for adapter in plan.adapters:
        _refuse_taken(session, adapter, mixed)
        session.add(adapter, registry, make, (sources or {}).get(adapter.name))
    if plan.active:
        trains = not all(a.config.inference_mode for a in plan.adapters) if trains is None else trains
        session.set_active(plan.active, trains)
    return session


def _live_graph(model: nn.Module, plan: InjectionPlan, session: Session | None) -> ModuleGraph:
    """The graph of the model as it is to be adapted: with the layers that a plan asks for. Raises `PeftcError`."""
    graph = snapshot(model)
    if session is not None and session.stack is not None:
        return graph
    graph, problems = laid_out(graph, {adapter.name: adapter.config for adapter in plan.adapters})
    if problems:
        raise PeftcError(problems)
    return graph


@whole
def strip(model: nn.Module, session: Session) -> None:
    """Take every wrapper and all that was noted on the model off it."""
    session.unload()
    keep(model)
    model.__dict__.pop(SESSION, None)
    model.__dict__.pop("peft_config", None)


def let_go(model: nn.Module) -> None:
    """Forget adapters that changed nothing of the model, as prompts do: it is an ordinary base then, for whoever has them too."""
    session = session_of(model) if isinstance(model, nn.Module) else None  # anything else is refused elsewhere
    if session is not None and session.is_apart:
        keep(model)
        model.__dict__.pop(SESSION)


def hold(model: nn.Module, session: Session) -> None:
    """Have the model know its adapters again after others let go of them. Raises `PeftcError` if it has others in it now."""
    if session_of(model) is session:
        return
    let_go(model)
    other = session_of(model)
    if other is not None:
        what = "The base model was adapted by others meanwhile"
        fix = "Take their adapters off it first, with `unload()`."
        raise PeftcError(rules.MIXED_TYPES(what, fix=fix))
    keep(model)
    model.__dict__[SESSION] = session


def _refuse_taken(session: Session, adapter: AdapterPlan, mixed: bool) -> None:
    if not is_usable(adapter.name):
        what = f"An adapter cannot be called `{ascii(adapter.name)[1:-1]:.60}`"
        fix = f"Use up to {MAX_NAME} bytes without dots, slashes and control characters, such as `default`."
        raise PeftcError(rules.ADAPTER_NAME(what, fix=fix))
    if adapter.name in session.plans:
        raise PeftcError(name_taken(adapter.name))
    types = {plan.peft_type for plan in session.plans.values() if not plan.needed_by}
    if adapter.needed_by:
        return
    if types - {adapter.peft_type} and not mixed:
        raise PeftcError(mixed_types(adapter.config, types))


def is_usable(name: object) -> bool:
    """Whether an adapter can have the name, which becomes part of names of parameters and the name of a folder."""
    if not isinstance(name, str) or not name.isprintable() or any(mark in name for mark in "./\\"):
        return False
    return 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME


def name_taken(name: str) -> Diagnostic:
    """The diagnostic for a second adapter of one name."""
    return rules.ADAPTER_EXISTS(
        f"Adapter with name '{name}' already exists", fix="Use another name, or delete it first."
    )


def mixed_types(config: PeftConfig, types: set[str]) -> Diagnostic:
    """The diagnostic for a second method on one model."""
    what = f"The model is adapted by {', '.join(sorted(types))}; `{config.peft_type}` cannot join"
    fix = "Begin with `get_peft_model(model, config, mixed=True)`, or merge the first adapter."
    return rules.MIXED_TYPES(what, fix=fix)


def freeze(model: nn.Module) -> None:
    """Stop every parameter of the model from requiring gradients."""
    for parameter in model.parameters():
        keep_trained(parameter, False)
