"""What starts need of a session: data that was gathered beforehand, and what is saved of the base weights that they change."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from peftc import rules
from peftc.checkpoint.keys import listed
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.diagnostics import PeftcError
from peftc.runtime.layer import gathered
from peftc.runtime.layer.starting import Held
from peftc.runtime.layer.wrapper import Source, TunerLayer
from peftc.runtime.session.applied import Applied
from peftc.tuner.start import Chosen, Reads


def refuse_unready(session: Applied, plan: AdapterPlan, chosen: Chosen | None, source: Source | None) -> None:
    """Raise `PeftcError` if layers would begin by a start whose data was not gathered, all of them told at once; and for a
    weighed adapter with base weights of its own."""
    if chosen is not None and chosen.start.changes_base and plan.needed_by:
        what = f"`{plan.name}` has base weights of its own, which no coefficient multiplies"
        raise PeftcError(rules.CANNOT_GATE(what, fix=turning([plan.name])))
    if chosen is None or chosen.start.reads is Reads.NOTHING or chosen.start.can_wait:
        return
    lacking = [
        site.path for site in plan.maps if chosen.acts_on(site.layer) and _lacks(session, site, chosen, source, plan)
    ]
    if lacking:
        more = f" and {len(lacking) - 1:,} more layers" if len(lacking) > 1 else ""
        what = f"`{chosen.value}` reads {chosen.start.reads}, and nothing was gathered for `{lacking[0]}`{more}"
        helper = f"Call `{chosen.start.helper}` on the base model first." if chosen.start.helper else "Gather it first."
        raise PeftcError(rules.START_DATA(what, fix=helper, where=lacking[0]))


def _lacks(session: Applied, site: MapSite, chosen: Chosen, source: Source | None, plan: AdapterPlan) -> bool:
    module = session.find(site.path)
    if module is None or gathered.gathered(module, chosen.start.name):
        return False
    if source is None:
        return True
    kept = chosen.start.kept if chosen.start.changes_base else ()
    keys = [site.kept_key(name) for name in kept]
    keys += [site.key(slot, plan.name).disk() for slot in site.slots if slot.saved]
    return any(source(key) is None for key in keys)


def let_go(session: Applied, plan: AdapterPlan, chosen: Chosen | None) -> None:
    """Forget what was gathered: the adapter has begun."""
    for site in plan.maps if chosen is not None and chosen.start.reads is not Reads.NOTHING else ():
        module = session.find(site.path)
        if module is not None and chosen is not None:
            gathered.let_go(module, chosen.start.name)


def changes_base(session: Applied, name: str) -> bool:
    """Whether an adapter has base weights of its own."""
    return session.shared.rebases and any(_held(layer, name) is not None for layer in session.layers_of(name))


def turning(names: Iterable[str]) -> str:
    """What to do with such adapters where only what is beside the original base can be used."""
    return (
        f"Save {listed(names)} with `path_initial_model_for_weight_conversion=True`, which turns it to the original base, and "
        "load that."
    )


def _held(layer: TunerLayer, name: str) -> Held | None:
    rebased = layer.rebased
    return None if rebased is None else rebased.held.get(name)


def kept(session: Applied, name: str) -> dict[str, Tensor]:
    """What the changes of base weights follow from, by key, as it is saved beside the adapter."""
    tensors: dict[str, Tensor] = {}
    for site in session.plans[name].maps if session.shared.rebases else ():
        layer = session.layer_of(name, site.path, site.parameter)
        held = None if layer is None else _held(layer, name)
        if held is not None:
            tensors |= {site.kept_key(label): tensor.detach() for label, tensor in held.kept.items()}
    return tensors
