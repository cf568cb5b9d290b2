"""Exchanging an adapter's values for those of another, in place: parameters stay the same objects, so what was compiled or
captured goes on working. Modules must be the same; ranks may differ where the method's factors can be padded with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.former import put_together
from peftc.checkpoint.keys import listed
from peftc.checkpoint.weights import load_peft_weights
from peftc.compiler.compile import compile_plan
from peftc.compiler.passes.sites import FOUND_OUT
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.config.files import read_config
from peftc.config.mixins import LayersMixin, RankMixin, TargetsMixin
from peftc.diagnostics import ConfigError, Diagnostic, PeftcError, Severity, did_you_mean, warn
from peftc.graph.nodes import Kind
from peftc.model.functions.state import origin_of
from peftc.model.injected import adapters_of, show, unwrapped
from peftc.model.parts.files import live_names
from peftc.model.parts.starts import chosen_by
from peftc.model.peft_model import PeftModel
from peftc.ops.combine import padded
from peftc.registry.manager import default_registry
from peftc.runtime.applying.planning import targeted
from peftc.runtime.bases.places import fill, refuse_offloaded
from peftc.runtime.journal import keep_entries, keep_entry, keep_memory, whole
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.session import Session
from peftc.runtime.session.starts import changes_base
from peftc.tuner.method import TunerMethod
from peftc.tuner.slots import Slot

#: Options that say which modules, how large, from where: what a swap brings along or what does not matter to it.
_FREE = (
    frozenset(name for cls in (PeftConfig, TargetsMixin, LayersMixin, RankMixin) for name in cls.model_fields)
    | FOUND_OUT
)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Replace an adapter's values, scalings and config by those of a saved adapter; its name stays.

    Parameters stay the same objects. Modules that the new adapter leaves out get a zero update, where the method has one.
    `torch_device` is where tensors are read to first; further keywords (`subfolder`, `revision`, …) choose the files.

    Raises `PeftcError`, with nothing changed: no such adapter, merged, files that cannot be read, options, modules or
    shapes that do not fit.
    """
    session = adapters_of(model)
    session.require([adapter_name])
    config = read_config(model_name_or_path, **kwargs)
    old = session.plans[adapter_name]
    named_anew = session.graph.former and config.peft_type == old.peft_type  # targets may have former names
    check_hotswap_configs_compatible(old.config, _plan_of(session, old, config).config if named_anew else config)
    state_dict = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise `PeftcError` naming every option by which one adapter could not take the other's place.

    Targets, ranks, scalings, patterns and initialisation may differ.
    """
    if config0.peft_type != config1.peft_type:
        what = f"An adapter of {config1.peft_type} cannot take the place of one of {config0.peft_type}"
        raise PeftcError(rules.CANNOT_SWAP(what, fix="Load it beside, with `load_adapter`."))
    method = _on_layers(config0)
    patterns = config0.pattern_options
    free = _FREE | set(patterns) | set(patterns.values()) | set(method.default_targets)
    ours, others = config0.to_dict(), config1.to_dict()
    differ = [n for n in ours if n not in free and not n.startswith("init_") and ours[n] != others.get(n)]
    if differ:
        raise PeftcError(
            rules.CANNOT_SWAP(
                f"`{name}` is `{others.get(name)}`, in the adapter to be replaced `{ours[name]}`",
                fix="Load it beside, with `load_adapter`.",
                where=name,
            )
            for name in differ
        )


def _on_layers(config: PeftConfig) -> TunerMethod:
    """The method of an adapter that can be swapped. Raises `PeftcError` for others."""
    method = default_registry().method_of(config)
    if not method.adapts_layers:
        what = f"`{config.peft_type}` has no tensors on layers to swap"
        raise PeftcError(rules.CANNOT_SWAP(what, fix="Use `load_adapter`, which overwrites an adapter of that name."))
    return method


@whole
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str | None = None,
) -> None:
    """Replace an adapter's values by a state dict's; keys are names in the model or in a checkpoint.

    Scalings are those of `config`, whose patterns count. `parameter_prefix` is not needed: the adapter's plan knows its
    names. Raises `PeftcError`, with nothing changed, as `hotswap_adapter` does.
    """
    session = adapters_of(model)
    session.require([adapter_name])
    session.refuse_merged(adapter_name)
    old = session.plans[adapter_name]
    _on_layers(old.config)
    if changes_base(session, adapter_name) or chosen_by(config) is not None:
        what = "The start of one of the adapters changed the base weights, which are not swapped"
        raise PeftcError(rules.CANNOT_SWAP(what, fix="Load it beside, with `load_adapter`."))
    origin = origin_of(state_dict, live_names(old), old.root)
    given = {key: state_dict[source] for key, source in origin.items()}
    plan = _plan_of(session, old, config)
    given = put_together(given, plan, session.graph, config)
    problems = [*_strangers(session, plan, given), *_misfits(session, plan, given)]
    if problems:
        raise PeftcError(problems)
    with torch.no_grad():
        swapped: set[str] = set()
        for site, layer in zip(plan.maps, session.layers_of(adapter_name), strict=True):
            _swap(layer, site, adapter_name, given, swapped)
        slots = {site.key(slot, adapter_name).disk() for site, slot in plan.slots()}
        for key, own in session.tensors(adapter_name).items():
            if key in given and key not in slots:
                fill(session.model, own, given[key])
        _record(unwrapped(model), session, plan)


def _plan_of(session: Session, old: AdapterPlan, config: PeftConfig) -> AdapterPlan:
    """What the new config means on the modules that are adapted."""
    of_attention = {node.path for node in session.graph.nodes if node.facts.kind is Kind.ATTENTION}
    paths = {site.path for site in old.maps if not site.spot or site.path in of_attention}
    compiled = compile_plan(
        session.graph, {old.name: targeted(config, paths)}, active=[], task_heads=False, given=paths
    )
    site_of = {(site.path, site.spot): site for site in compiled.adapters[0].maps}
    lacking = [site for site in old.maps if (site.path, site.spot) not in site_of]
    if lacking:
        what = f"By the new config `{lacking[0].path}.{lacking[0].spot}` is not adapted"
        fix = "Swap in an adapter with the same `target_parameters`."
        raise PeftcError(rules.CANNOT_SWAP(what, fix=fix, where=lacking[0].path))
    kept = {name: getattr(old.config, name) for name in ("inference_mode", "task_type", "auto_mapping")}
    kept["base_model_name_or_path"] = old.config.base_model_name_or_path
    maps = tuple(replace(site_of[site.path, site.spot], dtype=site.dtype) for site in old.maps)
    return replace(old, config=compiled.adapters[0].config.model_copy(update=kept), maps=maps)


def _strangers(session: Session, plan: AdapterPlan, given: Mapping[str, Tensor]) -> Iterator[Diagnostic]:
    own = session.tensors(plan.name)
    copies = plan.copies()
    strange = [key for key in given if key not in own and key not in {*copies, *plan.mirrors()}]
    if strange:
        what = f"{len(strange)} tensors are on modules that the adapter has not: {listed(strange)}"
        fix = did_you_mean(strange[0], own) or "Load it beside, with `load_adapter`."
        yield rules.CANNOT_SWAP(what, fix=fix)
    tied = {copy: key for copy, key in copies.items() if copy in given and key in given}
    for copy in (copy for copy, key in tied.items() if not torch.equal(given[copy], given[key])):
        what = f"`{copy}` differs from `{tied[copy]}`, though they are one tensor here, as the layers' weights are tied"
        yield rules.CANNOT_SWAP(what, fix="Leave out the one that does not count.")
    if not given:
        yield rules.NOTHING_LOADS("The state dict holds no tensor", fix="Give an adapter's state dict.")


def _misfits(session: Session, plan: AdapterPlan, given: Mapping[str, Tensor]) -> Iterator[Diagnostic]:
    """Layers that are given in part or, where no update is neutral, not at all; tensors of a shape that the config denies;
    layers that the config would have computed in another way."""
    method = default_registry().method_of(plan.config)
    for site, layer in zip(plan.maps, session.layers_of(plan.name), strict=True):
        tuner = layer.part(plan.name).tuner
        if site.tuner(method, plan.config, session.graph) is not tuner:
            what = f"By the new config `{site.path}` is computed in another way"
            yield rules.CANNOT_SWAP(what, fix="Load it beside, with `load_adapter`.", where=site.path)
            continue
        keys = {site.key(slot, plan.name).disk(): slot for slot in site.slots if slot.saved}
        lacking = [key for key in keys if key not in given]
        if lacking and (len(lacking) < len(keys) or not tuner.has_ranks):
            what = f"`{site.path}` gets nothing for {listed(lacking)}"
            yield rules.CANNOT_SWAP(what, fix="Swap in an adapter of the same modules.", where=site.path)
        larger = site.parameter and any(
            s.shape != o.shape for s, o in zip(site.slots, layer.site(plan.name).slots, strict=True)
        )
        if larger:
            what = f"The ranks of `{site.path}.{site.parameter}` differ; its factors are stacked by expert"
            yield rules.CANNOT_SWAP(what, fix="Swap in an adapter of the same rank.", where=site.path)
        for key, slot in keys.items():
            if key in given and tuple(given[key].shape) != slot.shape:
                what = f"`{key}` is {tuple(given[key].shape)}, by the config {slot.shape}"
                fix = "Give the config that belongs to the tensors."
                yield rules.CANNOT_SWAP(what, fix=fix, where=site.path)


def _swap(
    layer: TunerLayer,
    site: MapSite,
    adapter: str,
    given: Mapping[str, Tensor],
    swapped: set[str],
) -> None:
    """Give a layer the new values. `swapped` are keys of shared tensors that another layer has brought already."""
    part = layer.part(adapter)
    for slot in site.slots:
        container, name = layer.where(adapter, slot)
        own: Tensor = container[name]
        key = site.key(slot, adapter).disk()
        if key in swapped:
            continue
        swapped |= {key} if slot.home is not None else set()
        value = given.get(key)
        if value is None and slot.derived:
            value = layer.derived(adapter, site)[slot.name]
        device = layer.device if own.is_meta else own.device
        made = torch.full(slot.shape, slot.value or 0.0, device=device) if value is None else value
        value = made.to(device, own.dtype)
        fits = all(new <= old for new, old in zip(value.shape, own.shape, strict=True))
        if fits and (value.shape == own.shape or part.tuner.has_ranks):
            fill(layer, own, value, slot.blocks)
        else:
            refuse_offloaded(layer, {key: own}, "would get another shape")
            keep_memory(own)
            own.data = value.clone()
    layer.exchange(adapter, site)


def _record(model: nn.Module, session: Session, plan: AdapterPlan) -> None:
    """Let everything that describes the adapter describe the new one."""
    keep_entry(session.plans, plan.name)
    session.plans[plan.name] = plan
    if isinstance(model, PeftModel):
        keep_entry(model.peft_config, plan.name)
        model.peft_config[plan.name] = plan.config
    elif session.shown is not None:
        show(model, session)


@whole
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Before compiling: turn scalings into tensors and pad thin factors with zeros to a rank that all adapters to come fit
    in, so that swapping changes neither numbers nor shapes in what was compiled.

    The output stays the same. `check_compiled` says what to do if the model is compiled already. `config` is accepted and
    left alone: padding is not saved, so an adapter's own rank goes on describing it.

    Raises `PeftcError`, with nothing changed: no adapter, compiled already, or a rank that is too small.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        what = f"`check_compiled` cannot be `{check_compiled}`"
        raise ConfigError(rules.BAD_VALUE(what, fix='Use `"error"`, `"warn"` or `"ignore"`.'))
    if unwrapped(model) is not model or model._compiled_call_impl is not None:
        _told_of_compiled(check_compiled)
    session = adapters_of(model)
    layers = [layer for layer in session.wrappers() if layer.adapters]
    if not layers:
        what = "No adapter is on a layer"
        raise PeftcError(rules.NOT_ADAPTED(what, fix="Load the first adapter before, and compile after."))
    shapes = [] if target_rank is None else list(_shapes(layers, target_rank))
    with torch.no_grad():
        refuse_offloaded(model, {str(n): own for n, (own, _) in enumerate(shapes)}, "would get another shape")
        for own, slot in shapes:
            keep_memory(own)
            own.data = padded(own.data, slot.shape, slot.blocks)
    for layer in layers:
        keep_entries(layer.scaling)
        device = layer.device
        for name, scale in layer.scaling.items():
            layer.scaling[name] = torch.as_tensor(scale, device=device)


def _told_of_compiled(check: str) -> None:
    what = "The model is compiled already, and would have to be compiled anew"
    told = rules.COMPILED_ALREADY(what, fix="Call `prepare_model_for_compiled_hotswap` before `torch.compile`.")
    if check == "error":
        raise PeftcError(told)
    if check == "warn":
        warn([replace(told, severity=Severity.WARNING)])


def _shapes(layers: Iterable[TunerLayer], rank: int) -> Iterator[tuple[Tensor, Slot]]:
    """Every slot's tensor with the slot as it is at a rank. Raises `PeftcError` if one is larger, or no method here has ranks."""
    found = False
    for layer in layers:
        for name in layer.adapters:
            tuner, site = layer.part(name).tuner, layer.site(name)
            wider = tuner.of_rank(site.config, rank) if tuner.has_ranks else None
            problems = () if wider is None else tuner.problems(wider, site.layer, site.path)
            if misfits := [problem for problem in problems if problem.severity is Severity.ERROR]:
                raise PeftcError(misfits)
            for slot in tuner.slots(wider, site.layer) if wider is not None else ():
                found = True
                container, key = layer.where(name, slot)
                own: Tensor = container[key]
                larger = [old for old, new in zip(own.shape, slot.shape, strict=True) if old > new]
                if larger:
                    before = max(larger) // (site.layer.experts or 1)
                    padded_to = f"Trying to pad the adapter to the target rank {rank}"
                    what = f"{padded_to}, but the original rank is larger ({before}): `{slot.name}` of `{name}`"
                    fix = "Use the largest rank of all adapters as `target_rank`."
                    raise PeftcError(rules.CANNOT_SWAP(what, fix=fix, where=site.path))
                yield own, slot
    if not found:
        what = "The adapters here have no rank that could be raised"
        raise PeftcError(rules.CANNOT_SWAP(what, fix="Leave `target_rank` out."))
