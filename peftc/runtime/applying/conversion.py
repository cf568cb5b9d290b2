"""An adapter as one of another method, whose updates are thin: each layer's change of the weight by its closest factors.

What can be converted is read off the layers, and what to read off the method's record: any change of weights alone can be
factored, and any method that makes slots of thin factors (`MapTuner.of_thin`) can hold the result. The model stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftc import rules
from peftc.compiler.compile import compile_plan
from peftc.compiler.passes.draft import listed
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.config.base import PeftConfig
from peftc.diagnostics import Collector, ConfigError, Diagnostic, PeftcError
from peftc.ops.factors import Factors, of_dense, of_thin
from peftc.registry.boundary import guarded
from peftc.registry.manager import default_registry
from peftc.runtime.bases.shards import refuse_sharded
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.session import Session
from peftc.runtime.session.stored import in_base_formats
from peftc.tuner.method import TunerMethod

#: options of the old adapter that say which modules it is about, and of what model; the new one gets them where it has them
_CARRIED = ("base_model_name_or_path", "revision", "task_type", "modules_to_save")
_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

#: shows how far a long loop is, by going along with it
Follow = Callable[[Sequence[TunerLayer]], Iterable[TunerLayer]]


@dataclass(frozen=True)
class Converted:
    """The new adapter's config and its tensors by checkpoint key; by path, what was found of each layer's change."""

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, Factors] = field(repr=False)

    @property
    def ranks(self) -> dict[str, int]:
        """Path -> rank."""
        return {path: found.rank for path, found in self.factors.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Path -> relative error of the layer's change, in the Frobenius norm."""
        return {path: found.error for path, found in self.factors.items()}

    @property
    def error(self) -> float:
        """Relative error of all changes together."""
        norm = math.hypot(*(found.norm for found in self.factors.values()))
        return math.hypot(*(found.lost for found in self.factors.values())) / norm if norm else 0.0


def converted(session: Session, name: str, to: str, rank: int | float, follow: Follow = iter) -> Converted:
    """The adapter `name` as one of the PEFT type `to`: of this rank, or, between 0 and 1, of those ranks that keep this
    share of each layer's squared singular values.

    Raises `PeftcError` with everything that keeps it from being converted: no such adapter, a rank that is none, layers
    whose bias changes or that the new method cannot adapt.
    """
    session.require([name])
    refuse_sharded(session.ways_to([session.plans[name]]), "its tensors are not here to be converted")
    target, plan = default_registry().get(to), session.plans[name]
    problems = Collector()
    problems.add(*_of_rank(rank), *_of_target(target), *_of_parameters(plan), *beside_weights(session, plan))
    problems.raise_errors(ConfigError)
    layers = list(session.layers_of(name))
    parts = {}
    for layer in follow(layers):
        path, tuner = layer.site(name).path, layer.part(name).tuner
        if not tuner.is_mergeable:
            what = f"`{name}` acts beside `{path}` and does not change its weight"
            problems.add(rules.CANNOT_CONVERT(what, fix="Keep the adapter as it is.", where=path))
            continue
        parts[path] = _factored(layer, name, rank)
        if parts[path] is None:
            what = f"`{name}` changes the bias of `{path}`, not only its weight"
            fix = "Merge it into the base instead, or exclude layers with a bias when it is trained."
            problems.add(rules.CANNOT_CONVERT(what, fix=fix, where=path))
    problems.raise_errors(ConfigError)
    factors = {path: found for path, found in parts.items() if found is not None}
    made = _planned(session, plan, target, {path: found.rank for path, found in factors.items()})
    return Converted(made.config, {**_slots(session, made, target, factors), **_copied(session, plan)}, factors)


def _of_rank(rank: Any) -> Iterable[Diagnostic]:
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not (whole and rank >= 1) and not (isinstance(rank, float) and 0 < rank <= 1):
        fix = "Give a whole number of 1 or more, or a share of the energy above 0.0, at most 1.0."
        yield rules.BAD_VALUE(f"`rank` cannot be `{rank}`", fix=fix)


def _of_target(target: TunerMethod) -> Iterable[Diagnostic]:
    if not target.is_rankable:
        registry = default_registry()
        able = [name for name in registry.names if registry.get(name).is_rankable]
        what = f"{target.peft_type} does not make adapters of thin factors"
        yield rules.CANNOT_CONVERT(what, fix=f"Convert to {' or '.join(able)}.")


def _of_parameters(plan: AdapterPlan) -> Iterable[Diagnostic]:
    if plan.adapts_parameters:
        what = f"`{plan.name}` adapts single parameters (`target_parameters`), which are not converted"
        yield rules.CANNOT_CONVERT(what, fix="Merge it into the base instead.")


def beside_weights(session: Session, plan: AdapterPlan) -> Iterable[Diagnostic]:
    """What an adapter has that is no change of a layer's weight."""
    if not plan.maps:
        what = f"`{plan.name}` ({plan.peft_type}) does not change weights of layers"
        yield rules.CANNOT_CONVERT(what, fix="Keep the adapter as it is.")
    rows = next((site.path for site in plan.maps if site.inside), None)
    if rows is not None:
        what = f"`{plan.name}` trains rows of `{rows}`, which are no change of low rank"
        yield rules.CANNOT_CONVERT(what, fix="Merge it into the base instead.", where=rows)
    if plan.trains:
        paths = listed(f"{train.path}.{train.name}" for train in plan.trains)
        what = f"`{plan.name}` trains tensors of the base model itself: {paths}"
        yield rules.CANNOT_CONVERT(what, fix="Merge it into the base instead.")
    if session.merged:
        what = f"{listed(session.merged)} is merged into the base weights"
        yield rules.WHILE_MERGED(what, fix="Call `unmerge_adapter()` first.")


def _factored(layer: TunerLayer, name: str, rank: int | float) -> Factors | None:
    """Factors of the adapter's change of a layer's weight; None if its bias changes too."""
    part = layer.part(name)
    with torch.no_grad():
        if "thin" in part.tuner.lowerings:
            A, B, scale = part.lowering("thin")(part.view)
            A, B = layer.beside_original(name, A.flatten(1) * float(scale), B.flatten(1))
            return of_thin(A, B, rank)
        changes = layer.changes(name)
        if any(change.any() for parameter, change in changes.items() if parameter != "weight"):
            return None
        return of_dense(changes["weight"], rank)


def _planned(session: Session, plan: AdapterPlan, target: TunerMethod, ranks: Mapping[str, int]) -> AdapterPlan:
    """The new adapter's plan, on exactly these modules. Raises `PeftcError` if the method cannot adapt one of them."""
    by_choice = _chosen(plan.config, target, _CHOICE)
    exact = {"target_modules": set(ranks)}
    for choice in (by_choice, exact) if by_choice.get("target_modules") else (exact,):
        start = target.least(**_chosen(plan.config, target, _CARRIED), **choice)
        config = _ranked(start, target, ranks)
        made = compile_plan(
            session.graph,
            {plan.name: config},
            autocast_adapter_dtype=False,  # what is saved is in the model's dtype
            given=list(ranks),
            loading=True,
            task_heads=False,
        )
        if rules.GIVEN_TARGETS.code not in {warning.code for warning in made.warnings}:
            break
    return made.adapters[0]


def _chosen(config: PeftConfig, target: TunerMethod, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options that both have."""
    both = type(config).model_fields.keys() & target.config.model_fields.keys()
    return {name: getattr(config, name) for name in names if name in both}


def _ranked(config: PeftConfig, target: TunerMethod, ranks: Mapping[str, int]) -> PeftConfig:
    """The config with these ranks and a scaling of 1: the most frequent one in general, others by pattern."""
    of_rank = guarded(target.map_tuners[0].of_rank, target.peft_type, None)
    common = max(ranks.values(), key=list(ranks.values()).count)
    general = of_rank(config, common)
    patterns: dict[str, dict[str, Any]] = {}
    for path, rank in sorted(ranks.items(), key=lambda item: -len(item[0])):  # the longest first: it is the most exact
        own = of_rank(config, rank)
        for pattern, option in config.pattern_options.items() if rank != common else ():
            key = f"^{path}" if any(other.endswith(f".{path}") for other in ranks) else path
            patterns.setdefault(pattern, {})[key] = getattr(own, option)
    assert general is not None
    return general.model_copy(update=patterns)


def _slots(
    session: Session, made: AdapterPlan, target: TunerMethod, factors: Mapping[str, Factors]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site in made.maps:
        found, tuner = factors[site.path], site.tuner(target, made.config, session.graph)
        if not tuner.is_rankable:
            what = f"{target.peft_type} makes no slots of thin factors on a {site.layer.cls} such as `{site.path}`"
            raise PeftcError(rules.CANNOT_CONVERT(what, fix="Merge it into the base instead.", where=site.path))
        slots = guarded(tuner.of_thin, target.peft_type, site.path)(site.config, site.layer, found.A, found.B)
        wrong = [slot.name for slot in site.slots if tuple(slots[slot.name].shape) != slot.shape]
        if wrong:
            what = f"No config of {target.peft_type} gives `{site.path}` the rank {found.rank}"
            raise PeftcError(rules.CANNOT_CONVERT(what, fix="Give one rank for all layers.", where=site.path))
        for slot in site.slots:
            dtype = getattr(torch, slot.dtype or site.dtype)
            tensors[site.key(slot, made.name).disk()] = slots[slot.name].to(dtype).contiguous()
    return tensors


def _copied(session: Session, plan: AdapterPlan) -> dict[str, Tensor]:
    """Modules that the adapter trains whole."""
    saved = tuple(f"{plan.root}{save.path}." for save in plan.saves)
    found = in_base_formats(session, plan.name, session.tensors(plan.name)).items() if saved else ()
    return {key: tensor.detach().clone() for key, tensor in found if key.startswith(saved)}
