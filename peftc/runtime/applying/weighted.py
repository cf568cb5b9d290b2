"""A new adapter out of others, weighted: their slots combined as the method says, or thin factors of what they come to.

Everything is computed before the model is touched. What can be combined is read off the method: whether it makes slots of
thin factors (`MapTuner.of_thin`), or combines slots in a way of its own (`MapTuner.combine`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftc import rules
from peftc.compiler.match import matches
from peftc.compiler.passes.draft import listed, option
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import Collector, Diagnostic, PeftcError, did_you_mean
from peftc.ops.combine import COMBINATIONS, PRUNING, Pruning, closest_factors, padded
from peftc.registry.boundary import guarded
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import name_taken
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.bases.shards import refuse_sharded
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.session import Session
from peftc.runtime.session.starts import changes_base, turning
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import labelled

#: ways to combine: those of thin factors, `cat`, and those of whole updates, whose closest thin factors are taken
TYPES = (*COMBINATIONS, "cat", "svd", *(f"{name}_svd" for name in COMBINATIONS if name != "linear"))
#: options that choose among the targets; where adapters differ in them, the new one names its modules in full
_FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Recipe:
    """How adapters become one: their names with their weights, the way, and its options."""

    weights: Mapping[str, float]
    kind: str = "svd"
    svd_rank: int | None = None
    svd: Mapping[str, Any] = field(default_factory=dict)
    pruning: Pruning = field(default_factory=Pruning)

    @property
    def on_updates(self) -> bool:
        """Whether whole updates are combined."""
        return self.kind.endswith("svd")


@dataclass(frozen=True)
class Combined:
    """The new adapter's config, the modules that it adapts (none where the config says it), and its tensors by checkpoint key."""

    config: PeftConfig
    paths: frozenset[str]
    tensors: Mapping[str, Tensor]

    def require_shapes(self, plan: AdapterPlan) -> None:
        """Raise `PeftcError` if the compiled adapter has slots of other shapes: its config could not say what it is."""
        slots = [(site.key(slot, plan.name).disk(), slot) for site, slot in plan.slots()]
        shapes = {key: slot.shape for key, slot in slots if not slot.derived}
        wrong = [
            key for key, shape in shapes.items() if key not in self.tensors or tuple(self.tensors[key].shape) != shape
        ]
        if wrong:
            what = f"No config describes the combination: {listed(wrong)} would have another shape"
            raise PeftcError(rules.CANNOT_COMBINE(what, fix="Combine adapters with the same options."))


def recipe(
    session: Session,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd: Mapping[str, Any] | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Recipe:
    """The options, checked. Raises `PeftcError` with every problem of them."""
    found = Collector()
    if adapter_name in session.plans:
        found.add(name_taken(adapter_name))
    if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        what = f"{len(adapters)} adapters and {len(weights)} weights are given"
        found.add(rules.CANNOT_COMBINE(what, fix="Name each adapter once, at least one, and give each a weight."))
    if not all(math.isfinite(weight) for weight in weights):
        found.add(rules.CANNOT_COMBINE("A weight is not finite", fix="Use numbers, negative ones to subtract."))
    if combination_type not in TYPES:
        hint = did_you_mean(combination_type, TYPES) or f"There are {', '.join(TYPES)}."
        found.add(rules.BAD_VALUE(f"There is no combination type `{combination_type}`", fix=hint))
    if majority_sign_method not in ("total", "frequency"):
        what = f"There is no sign method `{majority_sign_method}`"
        found.add(rules.BAD_VALUE(what, fix="Use `total` or `frequency`."))
    prunes = combination_type.removesuffix("_svd") in PRUNING and len(adapters) > 1
    if prunes and not (density is not None and 0 < density <= 1):
        what = f"`{combination_type}` keeps a share of the entries, and `density` is `{density}`"
        found.add(rules.BAD_VALUE(what, fix="Give a `density` above 0, at most 1."))
    if svd_rank is not None and svd_rank < 1:
        found.add(rules.BAD_VALUE(f"`svd_rank` cannot be `{svd_rank}`", fix="Give a rank of 1 or more."))
    found.raise_errors()
    session.require(adapters)
    refuse_sharded(session.ways_to(session.plans[name] for name in adapters), "its tensors are not here to be combined")
    kind = "linear" if len(adapters) == 1 else combination_type
    pruning = Pruning(1.0 if density is None else density, majority_sign_method)
    return Recipe(dict(zip(adapters, weights, strict=True)), kind, svd_rank, svd or {}, pruning)


def combined(session: Session, how: Recipe, adapter_name: str) -> Combined:
    """Compute the new adapter. Raises `PeftcError` if these cannot be combined in that way; nothing is changed."""
    plans = [session.plans[name] for name in how.weights]
    found = Collector()
    found.add(*_beside_layers(plans))
    apart = [plan.name for plan in plans if changes_base(session, plan.name)]
    if apart:
        what = f"The starts of {listed(apart)} changed the base weights, each in its own way"
        found.add(rules.CANNOT_COMBINE(what, fix=turning(apart)))
    found.raise_errors()
    members = _members(session, plans)
    found.add(*_wrong_way(members, how))
    found.raise_errors()
    tuner = next(iter(members.values())).tuner
    rank = _rank(plans, how) if tuner.is_rankable else _joint_rank(plans) if tuner.has_ranks else 0
    config = plans[0].config.model_copy(update={**_targets(session, plans, members), **_saved(plans)})
    tensors: dict[str, Tensor] = {}
    for member in members.values():
        site = member.site
        slots = _of_factors(member, how, rank) if tuner.is_rankable else _own_way(member, how, rank)
        named = labelled(site.slots).items()
        tensors |= {site.key(slot, adapter_name).disk(): slots[label] for label, slot in named if not slot.derived}
    for plan in plans:
        copied = tuple(f"{plan.root}{save.path}." for save in plan.saves)
        tensors |= {
            key: tensor.detach().clone()  # the new adapter's own
            for key, tensor in session.tensors(plan.name).items()
            if copied and key.startswith(copied)
        }
    return Combined((_of_rank(tuner, config, rank) if rank else None) or config, frozenset(members), tensors)


@dataclass(frozen=True)
class _Member:
    """A module with those of the adapters that it has."""

    layer: TunerLayer
    names: list[str] = field(default_factory=list)

    @property
    def site(self) -> MapSite:
        return self.layer.site(self.names[0])

    @property
    def tuner(self) -> MapTuner[Any]:
        return self.layer.part(self.names[0]).tuner


def _members(session: Session, plans: Sequence[AdapterPlan]) -> dict[str, _Member]:
    """The adapted modules, in the order of the model."""
    found: dict[str, _Member] = {}
    for plan in plans:
        for site, layer in zip(plan.maps, session.layers_of(plan.name), strict=True):
            found.setdefault(site.path, _Member(layer)).names.append(plan.name)
    return {node.path: found[node.path] for node in session.graph.nodes if node.path in found}


def _beside_layers(plans: Sequence[AdapterPlan]) -> list[Diagnostic]:
    """What adapters have beside slots on layers and cannot be weighted."""
    types = sorted({plan.peft_type for plan in plans})
    if len(types) > 1:
        what = f"They are of several methods: {', '.join(types)}"
        return [rules.CANNOT_COMBINE(what, fix="Combine adapters of one method.")]
    problems = []
    for plan in plans:
        if plan.prompt is not None:
            what = f"`{plan.name}` is a prompt, which has no layers"
            problems.append(rules.CANNOT_COMBINE(what, fix="Keep the prompts beside each other."))
        if plan.adapts_parameters:
            what = f"add_weighted_adapter does not support targeting nn.Parameter, as `{plan.name}` does: factors of experts are stacked"
            problems.append(rules.CANNOT_COMBINE(what, fix="Activate several instead: `set_adapter([...])`."))
        rows = next((site.path for site in plan.maps if site.inside), None)
        if rows is not None:
            what = f"`{plan.name}` trains rows of `{rows}`, which take the place of others and do not add up"
            problems.append(
                rules.CANNOT_COMBINE(what, fix="Activate several instead: `set_adapter([...])`.", where=rows)
            )
        if plan.modules:
            what = f"`{plan.name}` acts around modules, not on layers"
            problems.append(rules.CANNOT_COMBINE(what, fix="Keep the adapters beside each other."))
        if plan.trains:
            what = f"`{plan.name}` trains tensors of the base model itself"
            problems.append(rules.CANNOT_COMBINE(what, fix="Merge it into the base instead."))
    for plan in [] if problems else plans:
        if not plan.maps:
            what = f"`{plan.name}` has nothing of its own on layers"
            problems.append(rules.CANNOT_COMBINE(what, fix="Keep the adapters beside each other."))
    saved = [save.path for plan in plans for save in plan.saves]
    for path in dict.fromkeys(path for path in saved if saved.count(path) > 1):
        what = f"`{path}` is trained whole (modules_to_save) by several of them"
        problems.append(rules.CANNOT_COMBINE(what, fix="Combine adapters of which at most one does so.", where=path))
    return problems


def _wrong_way(members: Mapping[str, _Member], how: Recipe) -> list[Diagnostic]:
    """Layers on which the method cannot combine adapters in the way that is asked for."""
    problems: dict[str, Diagnostic] = {}
    for path, member in members.items():
        tuner, kind = member.tuner, member.site.config.peft_type
        if any(member.layer.part(name).tuner is not tuner for name in member.names):
            what = f"`{path}` is adapted in different ways by {', '.join(f'`{name}`' for name in member.names)}"
            problems[path] = rules.CANNOT_COMBINE(what, fix="Combine adapters with the same options.", where=path)
        elif not tuner.is_rankable and not tuner.is_combinable:
            what = f"`{kind}` says no way to combine adapters on a {member.site.layer.cls} such as `{path}`"
            problems[what] = rules.CANNOT_COMBINE(what, fix="Activate several instead: `set_adapter([...])`.")
        elif not tuner.is_rankable and how.kind not in ("svd", "linear", *(("cat",) if tuner.has_ranks else ())):
            what = f"`{kind}` combines adapters in one way of its own, not by `{how.kind}`"
            problems[what] = rules.CANNOT_COMBINE(what, fix="Leave `combination_type` out.")
    return list(problems.values())


def _rank(plans: Sequence[AdapterPlan], how: Recipe) -> int:
    """The new adapter's rank: the sum, the one that all have, or for closest factors the largest or the given one."""
    ranks = {plan.name: _largest_rank(plan.config) for plan in plans}
    if how.kind == "cat":
        return sum(ranks.values())
    if how.on_updates:
        return how.svd_rank or max(ranks.values())
    if len(set(ranks.values())) > 1:
        have = ", ".join(f"`{name}` {rank}" for name, rank in ranks.items())
        what = f"`{how.kind}` adds factors entry by entry, and the ranks differ: {have}"
        raise PeftcError(rules.CANNOT_COMBINE(what, fix="Use `cat` or `svd`, which are exact."))
    return max(ranks.values())


def _joint_rank(plans: Sequence[AdapterPlan]) -> int:
    """Of a method that puts slots beside each other in its own way: the rank that holds those of all."""
    return sum(_largest_rank(plan.config) for plan in plans)


def _largest_rank(config: PeftConfig) -> int:
    patterns = [name for name, target in config.pattern_options.items() if target == "r"]
    return max(option(config, "r"), *(r for name in patterns for r in (option(config, name) or {}).values()), 0)


def _targets(session: Session, plans: Sequence[AdapterPlan], members: Mapping[str, _Member]) -> dict[str, Any]:
    """Options by which a file finds the modules of all of them again, and those that tell kinds of targets apart."""
    configs = [plan.config for plan in plans]
    names = [name for name in _FILTERS if name in type(configs[0]).model_fields]
    alike = all(option(config, name) == option(configs[0], name) for config in configs for name in names)
    beside = default_registry().get(plans[0].peft_type).default_targets
    chosen = {
        name: _either([option(config, name) for config in configs], members, alike)
        for name in dict.fromkeys(("target_modules", *beside))
    }
    return chosen if alike else {**chosen, **dict.fromkeys(names)}


def _either(values: Sequence[Any], paths: Collection[str], by_name: bool) -> set[str] | str:
    """What one of several targets means: names together, patterns as alternatives, otherwise the paths themselves."""
    if by_name and all(isinstance(value, set) for value in values):
        return set().union(*values)
    if by_name and all(isinstance(value, str) for value in values):
        return "|".join(f"({value})" for value in values)
    return {path for path in paths if any(value and matches(value, path) for value in values)}


def _saved(plans: Sequence[AdapterPlan]) -> dict[str, Any]:
    names = [name for plan in plans for name in option(plan.config, "modules_to_save") or ()]
    return {"modules_to_save": list(dict.fromkeys(names))} if names else {}


def _of_factors(member: _Member, how: Recipe, rank: int) -> Mapping[str, Tensor]:
    site = member.site
    of_thin = guarded(member.tuner.of_thin, str(site.config.peft_type), site.path)
    return of_thin(_of_rank(member.tuner, site.config, rank), site.layer, *_factors(member, how, rank))


def _of_rank(tuner: MapTuner[Any], config: PeftConfig, rank: int) -> PeftConfig | None:
    return guarded(tuner.of_rank, str(config.peft_type), None)(config, rank)


def _factors(member: _Member, how: Recipe, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the combination on one layer with a scaling of 1: A `(rank, in · kernel)`, B `(out, rank)`."""
    with torch.no_grad():
        parts = []
        for name in member.names:
            part = member.layer.part(name)
            A, B, scale = part.lowering("thin")(part.view.fixed(training=False))
            parts.append((A.flatten(1), B.flatten(1), float(scale), how.weights[name]))
        if how.kind == "cat":
            A = torch.cat([A * weight * scale for A, _, scale, weight in parts])
            B = torch.cat([B for _, B, _, _ in parts], dim=1)
        elif how.on_updates:
            combine = COMBINATIONS[how.kind.removesuffix("svd").rstrip("_") or "linear"]
            weights = torch.tensor([weight for *_, weight in parts], device=parts[0][0].device)
            deltas = [_stored(member, (B @ A) * scale) for A, B, scale, _ in parts]  # so that random draws are alike
            delta = member.layer.backend.to_logical("weight", combine(deltas, weights, how.pruning))
            dtype = parts[0][0].dtype
            A, B = (factor.to(dtype) for factor in closest_factors(delta.float(), rank, **how.svd))
        else:
            A, B = _entrywise(parts, how, rank)
        return padded(A, (rank, A.shape[1])), padded(B, (B.shape[0], rank))


def _stored(member: _Member, delta: Tensor) -> Tensor:
    like = tensor_of(member.layer.get_base_layer(), "weight")
    return delta if like is None else member.layer.backend.to_stored("weight", delta, like)


def _entrywise(parts: Sequence[tuple[Tensor, Tensor, float, float]], how: Recipe, rank: int) -> tuple[Tensor, Tensor]:
    """Factors combined entry by entry, each with the root of its weight; the sign goes to A."""
    combine = COMBINATIONS[how.kind]
    device, dtype = parts[0][0].device, parts[0][0].dtype
    roots = [math.sqrt(abs(weight * scale)) for _, _, scale, weight in parts]
    signed = [math.copysign(root, weight * scale) for root, (_, _, scale, weight) in zip(roots, parts, strict=True)]
    exact = torch.promote_types(dtype, torch.float32)  # roots in float32 would round factors in float64
    firsts = [padded(A, (rank, A.shape[1])) for A, *_ in parts]
    seconds = [padded(B, (B.shape[0], rank)) for _, B, *_ in parts]
    A = combine(firsts, torch.tensor(signed, device=device, dtype=exact), how.pruning)
    B = combine(seconds, torch.tensor(roots, device=device, dtype=exact), how.pruning)
    return A.to(dtype), B.to(dtype)


def _own_way(member: _Member, how: Recipe, rank: int) -> Mapping[str, Tensor]:
    """Slots as the method combines them; of one that has ranks, padded to those of the joint rank."""
    site, part = member.site, member.layer.part(member.names[0])
    views = [member.layer.part(name).view for name in member.names]
    slots = {label: [view[label].detach() for view in views] for label in labelled(site.slots)}
    own = member.tuner.scaling(site.config, site.layer)  # the new adapter's; those of others count with their weights
    weights = [how.weights[view.adapter] * float(view.scaling) / own for view in views]
    with torch.no_grad():
        result: Mapping[str, Tensor] = part.lowering("combine")(site.config, slots, weights)
    wider = _of_rank(member.tuner, site.config, rank) if rank else None
    if wider is None:
        return result
    joint = labelled(guarded(member.tuner.slots, str(wider.peft_type), site.path)(wider, site.layer))
    return {label: padded(tensor, joint[label].shape) for label, tensor in result.items()}
