"""Adapters written for the layers that a model had before a library fused or renamed them, for engines that know those, or for
those of today.

The first is the way back of `peftc.checkpoint.former`: each expert's layers get slots of their own, and the config the names of
then. The model that the two describe is the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peftc import rules
from peftc.checkpoint.former import as_of_now, can_join, part_of, with_ranks
from peftc.checkpoint.load import AdapterFile
from peftc.checkpoint.report import match_file
from peftc.compiler.compile import compile_plan
from peftc.compiler.match import Names
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic, PeftcError, Severity, warn
from peftc.graph.former import EXPERT, FormerLayers, starred
from peftc.graph.nodes import ModuleGraph, ModuleNode
from peftc.registry.boundary import boundary
from peftc.registry.manager import default_registry
from peftc.runtime.session.stored import fitted
from peftc.tuner.experts import tuner_for
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import labelled

#: What a layer without former names was: itself.
_ITSELF = "weight"
#: Options that choose among targets by what modules are called today.
_CHOICES = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class FormerAdapter:
    """An adapter in one of the two layouts: its config, and its tensors by checkpoint key."""

    config: PeftConfig
    tensors: Mapping[str, Tensor]


def as_of_then(config: PeftConfig, file: AdapterFile, graph: ModuleGraph) -> FormerAdapter:
    """An adapter for the layers that the model had before; exact.

    Raises `PeftcError`: the file does not fit the model, the adapter acts on a parameter that was no layers, or its method
    has no update of several layers that come to it.
    """
    plan, tensors = _read(config, file, graph)
    writer = _Writer(plan, graph)
    for site in plan.maps:
        writer.take(site, tensors)
    if writer.problems:
        raise PeftcError(writer.problems)
    rest = {writer.name_of(key): tensor for key, tensor in tensors.items() if key not in writer.taken}
    return FormerAdapter(writer.config(), {**rest, **writer.tensors})


def as_of_today(config: PeftConfig, file: AdapterFile, graph: ModuleGraph) -> FormerAdapter:
    """The way there: an adapter for the layers that the model has now, as it would be saved after loading; one of today's stays as
    it is. Raises `PeftcError` if the file does not fit the model, or its method cannot join what it has of several layers.
    """
    plan, tensors = _read(config, file, graph)
    return FormerAdapter(plan.config, tensors)


def _read(config: PeftConfig, file: AdapterFile, graph: ModuleGraph) -> tuple[AdapterPlan, dict[str, Tensor]]:
    """The adapter's plan and its tensors by planned key."""
    plan = compile_plan(graph, {"default": config}, loading=True).adapters[0]
    now, former = as_of_now(file, plan, graph, config)
    if former.ranks:
        plan = compile_plan(graph, {"default": with_ranks(plan.config, former.ranks)}, loading=True).adapters[0]
        now, former = as_of_now(file, plan, graph, config)
    if any(problem.severity is Severity.ERROR for problem in former.problems):
        raise PeftcError(former.problems)
    warn(former.problems)
    plan = fitted(plan, graph, now.tensors)
    model = graph.model
    paths = tuple(f"{plan.root}{path}." for path in (model.input_embeddings, model.output_embeddings) if path)
    carried = {key: facts for key, facts in now.tensors.items() if key.startswith(paths)}
    report = match_file(plan, now, model, carried).require()
    return plan, {key: now.tensor(source) for key, source in report.sources.items()}


@dataclass
class _Writer:
    """Puts one adapter together. `options` are those in force for each former layer, by its path."""

    plan: AdapterPlan
    graph: ModuleGraph
    tensors: dict[str, Tensor] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    options: dict[str, tuple[tuple[str, Any], ...]] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)

    def take(self, site: MapSite, tensors: Mapping[str, Tensor]) -> None:
        """Write what one site has."""
        keys = {
            label: site.key(slot, self.plan.name).disk() for label, slot in labelled(site.slots).items() if slot.saved
        }
        former = self._former(site)
        if former is None or any(key not in tensors for key in keys.values()):
            return
        self.taken |= set(keys.values())
        tuner = site.tuner(default_registry().method_of(self.plan.config), self.plan.config, self.graph)
        slots = {label: tensors[key] for label, key in keys.items()}
        dotted = {label: slot.dotted for label, slot in labelled(site.slots).items()}
        if not site.parameter:
            self._write(former.layers[0], slots, dotted, site.config)
            return
        with boundary(self.plan.peft_type, "parted", site.path), torch.no_grad():
            parts = tuner.parted(site.config, site.layer, len(former.layers), slots)
        config = self._config(site, tuner, len(former.layers), parts[0][0])
        for expert, row in enumerate(parts):
            for layer, own in zip(former.layers, row, strict=True):
                self._write(layer.replace(EXPERT, str(expert)), own, dotted, config)

    def _former(self, site: MapSite) -> FormerLayers | None:
        """What the site's weight was; None with a problem noted if it cannot be written so."""
        name = site.parameter or _ITSELF
        known = (former for former in self.graph.former_names.of(site.path) if former.parameter == name)
        former = next(known, FormerLayers(site.path, name, (site.path,)) if name == _ITSELF else None)
        where = f"{site.path}.{site.parameter}"
        if former is None:
            what = f"`{where}` was no layers before, as far as transformers says"
            fix = "Keep the adapter as it is; engines that know this model know its names."
            self.problems.append(
                rules.CANNOT_JOIN(what, why="There are no former names to write.", fix=fix, where=where)
            )
            return None
        tuner = site.tuner(default_registry().method_of(self.plan.config), self.plan.config, self.graph)
        if site.parameter and not can_join(tuner, len(former.layers)):
            what = f"{self.plan.peft_type} on `{where}` is no update of each of {', '.join(former.names)}"
            fix = "Keep the adapter as it is."
            self.problems.append(rules.CANNOT_JOIN(what, fix=fix, where=where))
            return None
        return former

    def _write(self, layer: str, slots: Mapping[str, Tensor], dotted: Mapping[str, str], config: PeftConfig) -> None:
        for label, tensor in slots.items():
            self.tensors[f"{self.plan.root}{layer}.{dotted[label]}"] = tensor
        self.options[layer] = tuple((option, getattr(config, option)) for option in config.pattern_options.values())

    def _config(self, site: MapSite, tuner: MapTuner[Any], parts: int, slots: Mapping[str, Tensor]) -> PeftConfig:
        """Options by which a former layer has these slots, and the scaling of the site. Raises `PeftcError` if none do."""
        facts = part_of(site.layer, parts)
        method, scaling = default_registry().method_of(self.plan.config), tuner.scaling(site.config, site.layer)
        shapes = {label: tuple(tensor.shape) for label, tensor in slots.items()}
        for config in _candidates(site.config, parts):
            one = tuner_for(method, config, ModuleNode("", facts))
            own = {label: slot.shape for label, slot in labelled(one.slots(config, facts)).items() if slot.saved}
            scaled = _scaled(config, one, facts, scaling) if own == shapes else None
            if scaled is not None:
                return scaled
        what = f"No options of {self.plan.peft_type} give the layers of `{site.path}` what they need"
        raise PeftcError(rules.CANNOT_JOIN(what, fix="Keep the adapter as it is.", where=site.path))

    def name_of(self, key: str) -> str:
        """The key of what is saved whole, under its module's former name."""
        path, _, tail = key.removeprefix(self.plan.root).rpartition(".")
        former = next(iter(self.graph.former_names.of(path)), None) if key.startswith(self.plan.root) else None
        single = former is not None and former.parameter == tail == _ITSELF
        return f"{self.plan.root}{former.layers[0]}.{tail}" if former is not None and single else key

    def config(self) -> PeftConfig:
        """The config: names of then, the most frequent options for all and the others by pattern."""
        config = self.plan.config
        changes: dict[str, Any] = {name: None for name in _CHOICES if name in type(config).model_fields}
        if "target_parameters" in type(config).model_fields:
            changes["target_parameters"] = None
        general = Counter(self.options.values()).most_common(1)[0][0] if self.options else ()
        changes |= dict(general)
        for name, option in config.pattern_options.items():
            usual = dict(general)[option]
            values = {layer: dict(own)[option] for layer, own in self.options.items()}
            changes[name] = _patterns(values, usual)
        targets = set(self.options)
        changes["target_modules"] = self._named(targets)
        default_targets = default_registry().get(self.plan.peft_type).default_targets
        for name in default_targets.keys() - {"target_modules"}:
            changes[name] = self._named({layer for layer in targets if self._is_named(getattr(config, name), layer)})
        return config.model_copy(update=changes)

    def _is_named(self, names: set[str] | str | None, layer: str) -> bool:
        """Whether an option beside the targets means the site that a former layer is part of."""
        now = self.graph.former_names.find(layer)
        path = layer if now is None else f"{now.module}.{now.parameter}"
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return bool(Names(names or ()).find(path)) or bool(Names(names or ()).find(layer))

    def _named(self, layers: set[str]) -> set[str] | str:
        """A choice of exactly these layers, among all that the model had: by their own names if these mean no others, or
        else by one expression, or one by one."""
        names = {layer.rpartition(".")[2] for layer in layers}
        found = Names(names)
        if {path for path in self._all if found.find(path)} == layers:
            return names
        kinds = sorted({starred(layer) for layer in layers})
        expression = "|".join(re.escape(kind).replace(r"\*", r"\d+") for kind in kinds)
        if {path for path in self._all if re.fullmatch(expression, path)} == layers:
            return expression
        return layers

    @cached_property
    def _all(self) -> frozenset[str]:
        """Paths of all modules that the model had, as far as they are known."""
        paths = set()
        for node in self.graph.nodes:
            known = self.graph.former_names.of(node.path)
            experts = {name: tensor.shape[0] for name, tensor in node.facts.params.items()}
            for former in known:
                count = experts[former.parameter] if former.of_experts else 1
                paths |= {layer.replace(EXPERT, str(e)) for layer in former.layers for e in range(count)}
            if not any(not former.of_experts for former in known):
                paths.add(node.path)
        return frozenset(paths)


def _candidates(config: PeftConfig, parts: int) -> Iterator[PeftConfig]:
    """Options of one former layer: those of the site, with a share of its rank or all of it."""
    rank = getattr(config, "r", None)
    if isinstance(rank, int) and parts > 1 and rank % parts == 0:
        yield config.model_copy(update={"r": rank // parts})
    yield config


def _scaled(config: PeftConfig, tuner: MapTuner[Any], facts: Any, scaling: float) -> PeftConfig | None:
    """The config changed in one option so that layers are scaled so; None if no option does."""
    own = tuner.scaling(config, facts)
    if math.isclose(own, scaling, rel_tol=1e-12):
        return config
    for option in config.pattern_options.values():
        value = getattr(config, option)
        if option == "r" or not value or not own:
            continue
        fit = value * scaling / own
        changed = config.model_copy(
            update={option: round(fit) if math.isclose(fit, round(fit), rel_tol=1e-12) else fit}
        )
        if math.isclose(tuner.scaling(changed, facts), scaling, rel_tol=1e-9):
            return changed
    return None


def _patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Values that are not the usual one: by a layer's own name where all of that name have it, or else by its path."""
    by_name: dict[str, set[Any]] = {}
    for layer, value in values.items():
        by_name.setdefault(layer.rpartition(".")[2], set()).add(value)
    short = {name: value for name, held in by_name.items() if len(held) == 1 and (value := next(iter(held))) != usual}
    single = {
        re.escape(layer): value
        for layer, value in values.items()
        if value != usual and layer.rpartition(".")[2] not in short
    }
    return {**single, **short}
