"""Adapters as plain dictionaries of tensors, with the keys that a checkpoint has: taken out of a model, and put into one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.former import put_together
from peftc.checkpoint.report import match
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import PeftcError
from peftc.graph.tensors import TensorFacts
from peftc.host import parallel
from peftc.model.injected import adapters_of, config_given, unwrapped
from peftc.model.parts.adapted import DEFAULT
from peftc.model.parts.files import live_names, tensors_of
from peftc.model.parts.loading import vocabulary_facts
from peftc.model.peft_model import PeftModel
from peftc.ops.combine import padded
from peftc.runtime.around.modules import ModuleWrapper
from peftc.runtime.bases.places import entire, fill
from peftc.runtime.bases.shards import refuse_parts
from peftc.runtime.journal import keep_entry, whole
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.session import Session
from peftc.runtime.session.stored import fitted, restored
from peftc.tuner.slots import Slot


class LoadResult(NamedTuple):
    """What torch returns from `load_state_dict`: names of the model that got no value, and keys that had no place."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = DEFAULT,
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """What a checkpoint of the adapter holds: key on disk -> tensor, not copied.

    Works on a `PeftModel` and on a model adapted in place, whose keys have no `base_model.model.`. With `state_dict`, as a
    sharded run gathers it, tensors are taken from there by their names in the model; an empty one gives an empty result,
    as other processes of such a run have nothing. FSDP's wrapper is asked for it, in the form that was set for it. A compiled model is seen through with `unwrap_compiled` or without.

    Raises `PeftcError` if the model has no such adapter or the state dict lacks part of it.
    """
    sharded = parallel.sharded(model)
    if sharded is not None and state_dict is None:
        state_dict = sharded.state_dict()
    model = unwrapped(model)
    session = adapters_of(model)
    session.require([adapter_name])
    if state_dict is not None and not state_dict:
        return {}
    tensors = tensors_of(model, session, adapter_name, save_embedding_layers, state_dict)
    if isinstance(model, PeftModel):
        return tensors
    root = session.plans[adapter_name].root
    return {key.removeprefix(root): tensor for key, tensor in tensors.items()}


@whole
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = DEFAULT,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Put a checkpoint's tensors into an adapter that the model has, in place; keys with or without `base_model.model.`.

    `ignore_mismatched_sizes` leaves tensors of another shape out, with a warning. With `low_cpu_mem_usage` slots take the
    given tensors themselves, dtype included, and so may be on the meta device before. FSDP's wrapper loads them itself, into
    each process its part. The result lists the adapter's
    names that got nothing and the keys without a place; both are warned of too.

    Raises `PeftcError`, with nothing changed: no such adapter, merged, other shapes, slots without memory, or no key has
    a place.
    """
    sharded = parallel.sharded(model)
    model = unwrapped(model)
    session = adapters_of(model)
    session.require([adapter_name])
    session.refuse_merged(adapter_name)
    plan = session.plans[adapter_name]
    names = live_names(plan)
    root = plan.root if isinstance(model, PeftModel) else ""
    origin = origin_of(peft_model_state_dict, names, plan.root)
    given = {key: peft_model_state_dict[source] for key, source in origin.items()}
    given = put_together(given, plan, session.graph, config_given(session, adapter_name))
    facts = {key: TensorFacts.of(tensor) for key, tensor in given.items()}
    fit = fitted(plan, session.graph, facts)
    values: Mapping[str, Tensor]
    report = match(
        fit,
        facts,
        vocabulary=vocabulary_facts(session, plan),
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        same=lambda one, other: torch.equal(given[one], given[other].to(given[one].device)),
    ).require()
    values = {key: given[source] for key, source in report.sources.items()}
    if sharded is not None:
        values = {key: value for key, value in values.items() if key in names}
        own = plan.root if model is session.model else ""
        sharded.load_state_dict({names[key].removeprefix(own): t for key, t in values.items()}, strict=False)
    else:
        values = _put_in(model, session, fit, values, low_cpu_mem_usage)
    missing = dict.fromkeys([*report.missing, *(key for key in names if key not in values)])
    live = [names.get(key, key).removeprefix(plan.root) for key in missing]
    return LoadResult([root + name for name in live], [origin.get(key, key) for key in report.unexpected])


def _put_in(
    model: nn.Module, session: Session, fit: AdapterPlan, given: Mapping[str, Tensor], assign: bool
) -> Mapping[str, Tensor]:
    """Give an adapter the values of a checkpoint, whose plan is `fit`; returns them as the adapter holds them. All or none."""
    if parallel.sharded_by(session.ways_to([session.plans[fit.name]], model)) is not None:
        refuse_parts(session.plans[fit.name], session.tensors(fit.name), "their values cannot be changed here")
    with torch.no_grad():
        rest = restored(session, fit, given)
        values = dict(rest)
        filled: dict[str, Tensor] = {}
        for disk, owner, slot in slots_of(session, fit.name):
            if disk in values:
                if disk in rest:
                    filled[disk] = _fill(owner, slot, fit.name, rest.pop(disk), assign)
                _hold(owner, slot, fit.name, filled[disk])  # or another layer has filled it
        for tensor, value in _others(model, session, fit.name, rest):
            fill(model, tensor, value)
        session.base.carry(session.plans[fit.name], rest.get)
    return values


def origin_of(keys: Iterable[str], names: Mapping[str, str], root: str) -> dict[str, str]:
    """Checkpoint key -> key as given: with its root, and without the adapter's name if it is a name of the live model."""
    disk = {name: key for key, name in names.items()}
    origin = {}
    for given in keys:
        key = given if given in names or given.startswith(root) else root + given
        origin[disk.get(key, key)] = given
    return origin


def slots_of(session: Session, adapter: str) -> Iterator[tuple[str, TunerLayer | ModuleWrapper, Slot]]:
    """Every slot of an adapter on layers or around modules: its checkpoint key, what holds it, and itself."""
    owners: list[TunerLayer | ModuleWrapper] = [*session.layers_of(adapter), *session.modules_of(adapter)]
    for site, owner in zip(session.plans[adapter].sites, owners, strict=True):
        for slot in site.slots:
            yield site.key(slot, adapter).disk(), owner, slot


def _fill(owner: TunerLayer | ModuleWrapper, slot: Slot, adapter: str, value: Tensor, assign: bool) -> Tensor:
    """Give a slot its value; returns the tensor that it has then."""
    container, key = owner.where(adapter, slot)
    own: Tensor = container[key]
    if not assign:
        if own.is_meta and entire(owner, {key: own})[key].is_meta:
            what = f"`{slot.name}` of `{adapter}` has no memory: it was made with `low_cpu_mem_usage`"
            raise PeftcError(rules.SHAPES_DIFFER(what, fix="Pass `low_cpu_mem_usage=True` here as well."))
        fill(owner, own, value, slot.blocks)
        return own
    base = next((p for p in owner.parameters() if not p.is_meta), value)
    fresh = padded(value.detach().to(base.device), own.shape, slot.blocks)
    held = fresh if slot.derived else nn.Parameter(fresh, requires_grad=own.requires_grad)
    _hold(owner, slot, adapter, held)
    return held


def _hold(owner: TunerLayer | ModuleWrapper, slot: Slot, adapter: str, tensor: Tensor) -> None:
    """Let a slot have this very tensor."""
    container, key = owner.where(adapter, slot)
    if container[key] is not tensor:
        keep_entry(container, key)
        container[key] = tensor


def _others(model: nn.Module, session: Session, adapter: str, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Any]]:
    """What of an adapter is no slot of a layer: trained copies, base tensors, prompts; each with its value."""
    own = session.tensors(adapter)
    pairs: list[tuple[Tensor, Any]] = [(own[key], value) for key, value in values.items() if key in own]
    if isinstance(model, PeftModel) and model.prompt_encoder is not None:
        pairs += model._encoders()[adapter].restored(values.get)
    return pairs
