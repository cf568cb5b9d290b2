"""Adapters whose checkpoint differs from what is in memory: slots as large as a file has them, and values both ways.

Methods say how (`MapTuner.fitted`, `export`, `restore`); for all others nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.named import assign_planned
from peftc.compiler.passes.starts import settled
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import ModuleGraph
from peftc.graph.tensors import TensorFacts
from peftc.registry.boundary import boundary
from peftc.registry.manager import default_registry
from peftc.registry.starts import known_start
from peftc.runtime.around.lifted import narrowed
from peftc.runtime.journal import keep_entry, whole
from peftc.runtime.session.session import Session
from peftc.runtime.session.steps import patch
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot, labelled

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def fitted(plan: AdapterPlan, graph: ModuleGraph, found: Mapping[str, TensorFacts]) -> AdapterPlan:
    """The plan with slots of the shapes that a checkpoint has, by its header, where the method's own are a bound."""
    sites = _with(plan, graph, "fitted")
    if not sites:
        return plan
    chosen = known_start(default_registry().method_of(plan.config), plan.config)
    keys = [site.key(slot, plan.name).disk() for site, _ in sites.values() for slot in site.slots if slot.saved]
    assigned = assign_planned(plan, keys, found)
    shapes = {key: found[stored].shape for key, stored in assigned.items()}
    known: dict[tuple[int, int, int, Shapes], tuple[Slot, ...]] = {}  # sites with equal slots share them
    maps = []
    for site in plan.maps:
        keys_of = _keys(site, plan.name)
        of = {label: shapes[key] for label, key in keys_of.items() if key in shapes}
        if site.path in sites and of and not site.inside:
            tuner = sites[site.path][1]
            kind = (id(tuner), id(site.layer), id(site.config), tuple(of.items()))
            if kind not in known:
                with boundary(plan.peft_type, "fitted", site.path):
                    slots = tuple(tuner.fitted(site.config, site.layer, of))
                known[kind] = slots if chosen is None else settled(chosen, tuner, site.config, site.layer, slots)
            site = site if known[kind] == site.slots else replace(site, slots=known[kind])
        maps.append(site)
    return replace(plan, maps=tuple(maps))


def exported(session: Session, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by checkpoint key, as its checkpoint holds them."""
    result = dict(tensors)
    sites = _with(session.plans[name], session.graph, "export") if "export" in session.seams[name] else {}
    for site, tuner in sites.values():
        keys = _keys(site, name)
        if all(key in result for key in keys.values()):
            own = {slot: result[key] for slot, key in keys.items()}
            with boundary(session.plans[name].peft_type, "export", site.path), torch.no_grad():
                made = tuner.export(site.config, site.path, site.layer, own)
            result |= {key: made[slot] for slot, key in keys.items()}
    plan = session.plans[name]
    result |= {copy: result[key] for copy, key in plan.copies().items() if key in result}
    return result | {copy: result[key].t().contiguous() for copy, key in plan.mirrors().items() if key in result}


def in_base_formats(session: Session, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by checkpoint key, those of modules that it trains whole in the number formats of the base.

    That is what the reference's files hold, and what loads there in every way: where tensors of a file become the
    model's own, a head in float32 beside a base in half precision could not compute.
    """
    result, plan = dict(tensors), session.plans[name]
    for save in plan.saves:
        root, original = f"{plan.root}{save.path}.", session.copies[save.path].original_module
        for key in [key for key in result if key.startswith(root)]:
            result[key] = narrowed(original, key.removeprefix(root), result[key])
    return result


def restored(session: Session, source: AdapterPlan, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a checkpoint, whose plan is `source`, for an adapter that the model has with other shapes; by key.

    Raises `PeftcError` if the adapter cannot hold them.
    """
    result = dict(values)
    live = session.plans[source.name]
    if "restore" not in session.seams[source.name]:
        return result
    for site, tuner in _with(source, session.graph, "restore").values():
        own = (
            next(other for other in live.maps if (other.path, other.spot) == (site.path, site.spot))
            if site not in live.maps
            else site
        )
        keys = _keys(site, source.name)
        if own.slots == site.slots or any(result.get(key) is None for key in keys.values()):
            continue
        saved = {slot: result[key] for slot, key in keys.items()}
        with boundary(source.peft_type, "restore", site.path), torch.no_grad():
            shapes = {label: slot.shape for label, slot in labelled(own.slots).items()}
            made = tuner.restore(site.config, site.path, site.layer, saved, shapes)
        result |= {key: made[slot] for slot, key in keys.items()}
    return result


@whole
def take_saved_form(session: Session, name: str, options: Mapping[str, Any]) -> None:
    """Change options that training comes to, and give the adapter the tensors that a checkpoint would then hold of it.

    Raises `PeftcError`, with the adapter as it was, if it is not there or merged, or if an option is another.
    """
    session.require([name])
    session.refuse_merged(name)
    foreign = options.keys() - _step_options(session, name)
    if foreign:
        what = f"`{sorted(foreign)[0]}` is not what training of a {session.plans[name].peft_type} comes to"
        raise PeftcError(rules.BAD_VALUE(what, fix="Make a new adapter with that option."))
    with torch.no_grad():
        patch(session, name, options)
        plan = session.plans[name]
        made = exported(session, name, session.tensors(name))
        facts = {key: TensorFacts.of(tensor) for key, tensor in made.items()}
        new = fitted(plan, session.graph, facts)
        layers = [
            (site, layer) for site in new.maps if (layer := session.layer_of(name, site.path, site.spot)) is not None
        ]
        for site, layer in layers:
            for slot in site.slots:
                container, key = layer.where(name, slot)
                if container[key].shape != slot.shape:
                    own: nn.Parameter = container[key]
                    keep_entry(container, key)
                    value = made[site.key(slot, name).disk()].detach().clone()
                    container[key] = nn.Parameter(value, requires_grad=own.requires_grad)
            layer.exchange(name, site)
        keep_entry(session.plans, name)
        session.plans[name] = new


def can_take(session: Session, name: str, unfitted: AdapterPlan) -> bool:
    """Whether an adapter of the model differs from one of a checkpoint only in what training came to, and can hold it."""
    live = session.plans[name]
    return "restore" in session.seams[name] and live.is_like(unfitted, _step_options(session, name))


def differing(session: Session, source: AdapterPlan) -> dict[str, Any]:
    """What training came to according to a checkpoint: options in which the adapter of the model differs from it."""
    own = session.plans[source.name].config
    found = {option: getattr(source.config, option) for option in _step_options(session, source.name)}
    return {option: value for option, value in found.items() if getattr(own, option) != value}


def without_padding(plan: AdapterPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by checkpoint key, as large as planned."""
    slots = {site.key(slot, plan.name).disk(): slot for site, slot in plan.slots()}
    return {key: _unpadded(tensor, slots[key]) if key in slots else tensor for key, tensor in tensors.items()}


def _unpadded(tensor: Tensor, slot: Slot) -> Tensor:
    """What an adapter has of a slot's tensor that was made larger, for others to be swapped in; a view where it can be."""
    if tensor.shape == slot.shape:
        return tensor
    blocks = tensor.unflatten(0, (slot.blocks, -1))
    own = blocks[:, : slot.shape[0] // slot.blocks].flatten(0, 1)
    return own[tuple(slice(size) for size in slot.shape)]


def _keys(site: MapSite, adapter: str) -> dict[str, str]:
    """Checkpoint keys of a layer's saved slots, by label."""
    return {label: site.key(slot, adapter).disk() for label, slot in labelled(site.slots).items() if slot.saved}


def _step_options(session: Session, name: str) -> frozenset[str]:
    tuners = {id(layer.part(name).tuner): layer.part(name).tuner for layer in session.layers_of(name)}
    return frozenset[str]().union(*(tuner.step_options for tuner in tuners.values()))


def _with(plan: AdapterPlan, graph: ModuleGraph, seam: str) -> dict[str, tuple[MapSite, MapTuner[Any]]]:
    """Layers whose mathematics gives a seam."""
    method = default_registry().method_of(plan.config)
    only = method.only_tuner
    if not method.adapts_layers or (only is not None and seam not in only.seams):
        return {}
    tuners = ((site, site.tuner(method, plan.config, graph)) for site in plan.maps if not site.inside)
    return {site.path: (site, tuner) for site, tuner in tuners if seam in tuner.seams}
