"""Checkpoints of the layers that a model had before a library fused or renamed them, read as those of today's.

A published adapter of experts has slots for each expert's layers (`experts.3.w1.lora_A.weight`); the model holds them all in
one parameter. The graph knows what each parameter was, the plan which slots it gets, and the method how slots are joined.
What a file comes to is decided by its header; tensors are joined when they are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.checkpoint.keys import listed, unwrapped
from peftc.checkpoint.load import AdapterFile
from peftc.compiler.match import Deadline, PatternKeys
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import Collector, Diagnostic, Severity, Where, warn
from peftc.graph.former import EXPERT, FormerLayers, FormerPlace
from peftc.graph.nodes import Kind, LayerFacts, ModuleGraph, ModuleNode
from peftc.graph.tensors import FactsByName, TensorFacts
from peftc.registry.boundary import boundary
from peftc.registry.manager import default_registry
from peftc.tuner.experts import PerExpert, tuner_for
from peftc.tuner.maps import Former, MapTuner
from peftc.tuner.slots import Slot, labelled

if TYPE_CHECKING:
    from torch import Tensor


#: Options in force for one layer, with their values.
Overrides = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Former layers of one shape and with the same options: config and saved slots by label, how many times larger their
    scaling was, and whether slots or scaling are others than a single expert's of today."""

    config: PeftConfig
    slots: Mapping[str, Slot]
    ratio: float
    differs: bool


@dataclass(frozen=True, slots=True)
class FormerKey:
    """A key of a former layer: `name` without wrappers and root, `tail` what follows the layer's path in it, where the layer is
    `now`, and the site on the parameter that it became, if there is one."""

    key: str
    name: str
    tail: str
    now: FormerPlace
    site: MapSite | None


@dataclass(frozen=True, slots=True)
class Share:
    """The keys of one former layer's slots, by label, and how many times larger its scaling was than its site's."""

    layer: str
    keys: Mapping[str, str]
    ratio: float


@dataclass(frozen=True)
class Joint:
    """A site whose slots are made of those of former layers: `shares[e][p]`, None where the file has nothing of a layer."""

    site: MapSite
    tuner: MapTuner[Any]
    shares: tuple[tuple[Share | None, ...], ...]

    @property
    def keys(self) -> Iterator[str]:
        """All keys of the file that go into it."""
        return (key for row in self.shares for share in row if share is not None for key in share.keys.values())

    def keys_of(self, label: str) -> Iterator[str]:
        """Keys of the file that go into one slot."""
        return (share.keys[label] for row in self.shares for share in row if share is not None)

    def made(self, label: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """One slot, from the file's tensors by key."""
        import torch  # here: headers are read without it

        experts = [
            [None if share is None else Former(tensors[share.keys[label]], share.ratio) for share in row]
            for row in self.shares
        ]
        with boundary(self.site.config.peft_type or "", "joined", self.site.path), torch.no_grad():
            return self.tuner.joined(self.site.config, self.site.layer, label, experts)


@dataclass(frozen=True)
class FormerSlots:
    """What of a file is of former layers.

    `renamed` maps planned keys to keys of the file that only have another name; `joints` are by planned key, with the slot's
    label. `rank` is what a site's rank must at least be, by its full parameter name, where the plan's is too small.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    joints: Mapping[str, tuple[Joint, str]] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[Diagnostic, ...] = ()

    def require(self) -> None:
        """Raise `PeftcError` for what cannot be, ranks beyond the plan's among it; show the rest as warnings."""
        found = Collector()
        found.add(*self.problems)
        for path, rank in self.ranks.items():
            what = f"`{path}` needs the rank {rank}"
            fix = "Load it with `PeftModel.from_pretrained`, which gives single layers what they need."
            found.add(rules.SHAPES_DIFFER(what, fix=fix, where=path))
        found.raise_errors()
        warn(found.warnings)

    @property
    def used(self) -> set[str]:
        """Keys of the file that it reads."""
        return {*self.renamed.values(), *(key for joint, _ in self.joints.values() for key in joint.keys)}


@dataclass(frozen=True)
class FormerFile(AdapterFile):
    """A file of former layers, as one of today's: `tensors` and keys are those of the layers that there are now."""

    former: FormerSlots = field(default_factory=FormerSlots)

    @cached_property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """Shape and dtype by key."""
        own, used = super().tensors, self.former.used
        made = {
            key: TensorFacts(labelled(joint.site.slots)[label].shape, own[next(joint.keys)].dtype)
            for key, (joint, label) in self.former.joints.items()
        }
        renamed = {new: own[key] for new, key in self.former.renamed.items()}
        return {**{key: facts for key, facts in own.items() if key not in used}, **renamed, **made}

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU; of a joint layer it is made now."""
        if key in self.former.joints:
            joint, label = self.former.joints[key]
            return joint.made(
                label, {source: super(FormerFile, self).tensor(source) for source in joint.keys_of(label)}
            )
        return super().tensor(self.former.renamed.get(key, key))

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and bytes."""
        a, b = self.tensor(one), self.tensor(other)
        return a.dtype == b.dtype and a.equal(b)


def as_of_now(
    file: AdapterFile, plan: AdapterPlan, graph: ModuleGraph, given: PeftConfig
) -> tuple[AdapterFile, FormerSlots]:
    """The file with what it has of former layers put together, and what that comes to; the file itself if it has none."""
    former = FormerReader(plan, graph, given, Where(file=str(file.path))).read(file.tensors)
    if not former.renamed and not former.joints:
        return file, former
    return FormerFile(file.path, file.header, file.content, former), former


def put_together(
    tensors: Mapping[str, Tensor], plan: AdapterPlan, graph: ModuleGraph, given: PeftConfig | None
) -> dict[str, Tensor]:
    """Tensors by key with those of former layers put together. Raises `PeftcError` where that cannot be."""
    facts = {key: TensorFacts.of(tensor) for key, tensor in tensors.items()}
    former = FormerReader(plan, graph, given, Where()).read(facts)
    former.require()
    used = former.used
    rest = {key: tensor for key, tensor in tensors.items() if key not in used}
    renamed = {key: tensors[source] for key, source in former.renamed.items()}
    return {**rest, **renamed, **{key: joint.made(label, tensors) for key, (joint, label) in former.joints.items()}}


def former_ranks(plan: InjectionPlan, given: PeftConfig) -> Mapping[str, int]:
    """Ranks that single layers must have for adapters of former layers with these options, where the plan's are too small."""
    patterned = any(getattr(given, name, None) for name in given.pattern_options)
    if not patterned or plan.graph is None or not plan.graph.former:
        return {}
    return FormerReader(plan.adapters[0], plan.graph, given, Where()).needed_ranks()


class FormerReader:
    """Finds former layers of one plan. `given` is the config of the file as it was before it was compiled: its patterns are
    over the paths of then. Without it each layer counts as having its share of the site's rank, at the site's scaling."""

    def __init__(self, plan: AdapterPlan, graph: ModuleGraph, given: PeftConfig | None, where: Where) -> None:
        self._plan, self._graph, self._given, self._where = plan, graph, given, where
        self._names = graph.former_names
        self._method = default_registry().method_of(plan.config)
        self._patterns = None if given is None else _Patterns(given)
        self._kinds: dict[object, _Kind] = {}
        self._missing: list[str] = []
        self._problems: list[Diagnostic] = []

    def needed_ranks(self) -> Mapping[str, int]:
        """`FormerSlots.ranks` of a file that has slots of every layer."""
        keys: dict[str, TensorFacts | None] = {}
        for site in self._sites.values():
            for former in self._names.of(site.path):
                if former.parameter == site.parameter:
                    tails = [slot.dotted for slot in self._kind(site, len(former.layers), ()).slots.values()]
                    layers = (
                        layer.replace(EXPERT, str(e)) for layer in former.layers for e in range(site.layer.experts)
                    )
                    keys |= {f"{layer}.{tail}": None for layer in layers for tail in tails}
        return FormerReader(self._plan, self._graph, self._given, self._where).read(keys).ranks

    def read(self, found: Mapping[str, TensorFacts | None]) -> FormerSlots:
        """What the file's keys come to; shapes are compared where they are known."""
        renamed: dict[str, str] = {}
        held: dict[tuple[str, str], dict[str, str]] = {}
        twice: list[tuple[str, str]] = []
        for place in self.places(found):
            if place.site is not None:
                keys, name = held.setdefault((place.site.path, place.site.parameter), {}), place.name
            elif place.now.expert is None:
                keys, name = renamed, f"{self._plan.root}{place.now.module}.{place.tail}"
            else:
                continue
            if name in keys:
                twice.append((keys[name], place.key))
            keys[name] = place.key
        joints: dict[str, tuple[Joint, str]] = {}
        ranks: dict[str, int] = {}
        for at, keys in held.items():
            joint = self._joint(self._sites[at], keys, found)
            if joint is None:
                continue
            for label, slot in labelled(joint.site.slots).items():
                if slot.saved:
                    joints[joint.site.key(slot, self._plan.name).disk()] = (joint, label)
            needed = self._rank(joint)
            if joint.tuner.joins and needed > getattr(joint.site.config, "r", needed):
                ranks[".".join(at)] = needed
        twice += self._of_both_layouts(renamed, joints, found)
        problems = [*self._problems, *self._lacking(), *self._collide(twice)]
        return FormerSlots(renamed, joints, ranks, tuple(problems))

    def _of_both_layouts(
        self, renamed: Mapping[str, str], joints: Mapping[str, tuple[Joint, str]], found: Iterable[str]
    ) -> Iterator[tuple[str, str]]:
        """Keys of former layers, each with one that the file has of what these are now."""
        sources = renamed | {key: next(joint.keys_of(label)) for key, (joint, label) in joints.items()}
        own, root = set(renamed.values()), self._plan.root
        now = {unwrapped(key, root): source for key, source in sources.items()} if sources else {}
        named = ((unwrapped(key, root), key) for key in (found if now else ()) if key not in own)
        yield from ((now[name], key) for name, key in named if name in now)

    def _collide(self, twice: Sequence[tuple[str, str]]) -> Iterator[Diagnostic]:
        """A word about tensors that the file has under two names."""
        if twice:
            (first, second), more = twice[0], f" and {len(twice) - 1:,} more" if len(twice) > 1 else ""
            what = f"The file has `{first}`, and `{second}` of the same layer{more}"
            fix = "Take out of the file what is not of the adapter: two adapters were put together, or one was saved twice."
            yield rules.KEYS_COLLIDE(what, fix=fix, where=self._where)

    def places(self, keys: Iterable[str]) -> Iterator[FormerKey]:
        """Those of the keys that are of layers which are elsewhere now."""
        tails = self._tails if self._names.layers else ()
        for key in keys:
            name = ".".join(unwrapped(key, self._plan.root))
            for tail in tails:
                now = self._names.find(name.removesuffix(f".{tail}")) if name.endswith(f".{tail}") else None
                if now is not None:
                    yield FormerKey(key, name, tail, now, self._sites.get((now.module, now.parameter)))
                    break

    @cached_property
    def _sites(self) -> Mapping[tuple[str, str], MapSite]:
        return {(site.path, site.parameter): site for site in self._plan.maps if site.parameter}

    @cached_property
    def _tails(self) -> Collection[str]:
        """What keys of slots end in, on linear layers and on those of today, and of modules that are saved whole."""
        tails = {tail: None for save in self._plan.saves for tail, _ in save.tensors}
        for site in {id(site.slots): site for site in self._plan.maps}.values():
            tails |= {slot.dotted: None for slot in site.slots if slot.saved}
            if site.layer.experts:
                tails |= {slot.dotted: None for slot in self._kind(site, 1, ()).slots.values()}
        return tails

    def _joint(self, site: MapSite, keys: Mapping[str, str], found: Mapping[str, TensorFacts | None]) -> Joint | None:
        """The site made of what the file has of its layers; None if that cannot be, with problems noted."""
        former = next(former for former in self._names.of(site.path) if former.parameter == site.parameter)
        tuner = site.tuner(self._method, self._plan.config, self._graph)
        if not can_join(tuner, len(former.layers)):
            names = ", ".join(f"`{name}`" for name in former.names)
            what = f"{self._plan.peft_type} on {names} cannot become one of `{site.path}.{site.parameter}`"
            why = "The layers are one now, joined by rows, and two updates of this method are not one update of the joint layer."
            fix = "Load it onto a model of the release that it was made with; or convert it there into a method that can, such as one of thin factors."
            self._problems.append(rules.CANNOT_JOIN(what, why=why, fix=fix, where=self._where))
            return None
        shares = tuple(
            tuple(self._share(site, tuner, former, expert, part, keys, found) for part in range(len(former.layers)))
            for expert in range(site.layer.experts)
        )
        if not any(share is not None for row in shares for share in row):
            return None
        return Joint(site, tuner, shares)

    def _share(
        self,
        site: MapSite,
        tuner: MapTuner[Any],
        former: FormerLayers,
        expert: int,
        part: int,
        keys: Mapping[str, str],
        found: Mapping[str, TensorFacts | None],
    ) -> Share | None:
        """What the file has of one former layer."""
        layer = former.layers[part].replace(EXPERT, str(expert))
        kind = self._kind(site, len(former.layers), self._overrides(layer))
        own = {label: keys.get(f"{layer}.{slot.dotted}") for label, slot in kind.slots.items()}
        held = {label: key for label, key in own.items() if key is not None}
        if len(held) < len(own):
            self._missing += [f"{layer}.{kind.slots[label].dotted}" for label in own if label not in held]
            return None
        for label, key in held.items():
            facts, shape = found[key], kind.slots[label].shape
            if facts is None or facts.shape == shape:
                continue
            what = f"`{key}` is {facts.shape} in the file and {shape} by its options"
            fix = "Load it onto the base model that it was trained on, with the config that it was saved with."
            self._problems.append(rules.SHAPES_DIFFER(what, fix=fix, where=self._where))
            return None
        if not tuner.joins and kind.differs:
            what = f"`{layer}` has options of its own, which {self._plan.peft_type} cannot have for one of the experts alone"
            fix = "Load it onto a model of the release that it was made with."
            self._problems.append(rules.CANNOT_JOIN(what, fix=fix, where=self._where))
            return None
        return Share(layer, held, kind.ratio)

    def _lacking(self) -> Iterator[Diagnostic]:
        """A word about layers that the file has nothing of, beside others of their kind that it has."""
        if not self._missing:
            return
        stacks = not all(tuner.joins for tuner in self._method.map_tuners)
        what = f"{len(self._missing)} tensors are not in the file: {listed(self._missing)}"
        fix = "If they were trained, get the whole file; these layers stay as in the base model."
        severity = Severity.ERROR if stacks else None
        yield rules.KEYS_MISSING(what, fix=fix, where=self._where, severity=severity)

    def _rank(self, joint: Joint) -> int:
        """How many directions the joint layer needs."""
        parts = len(joint.shares[0])
        return max(
            sum(
                getattr(self._kind(joint.site, parts, self._overrides(share.layer)).config, "r", 0)
                for share in row
                if share is not None
            )
            for row in joint.shares
        )

    def _overrides(self, layer: str) -> Overrides:
        return () if self._patterns is None else self._patterns.of(layer)

    def _kind(self, site: MapSite, parts: int, overrides: Overrides) -> _Kind:
        """An adapter with these options on a layer that was one of so many parts of a site's."""
        key = (id(site.layer), id(site.config), parts, overrides)
        if key not in self._kinds:
            config = self._options(site, parts, overrides)
            facts = part_of(site.layer, parts)
            tuner = tuner_for(self._method, config, ModuleNode("", facts))
            slots = {label: slot for label, slot in labelled(tuner.slots(config, facts)).items() if slot.saved}
            stack = site.tuner(self._method, self._plan.config, self._graph)
            now = stack.scaling(site.config, site.layer)
            ratio = tuner.scaling(config, facts) / now if now else 1.0
            ratio = 1.0 if self._given is None or math.isclose(ratio, 1.0, rel_tol=1e-9) else ratio
            shapes = {label: slot.shape[1:] for label, slot in labelled(site.slots).items()}
            differs = ratio != 1.0 or any(
                slot.shape != shapes.get(label) for label, slot in slots.items() if label in shapes
            )
            self._kinds[key] = _Kind(config, slots, ratio, differs)
        return self._kinds[key]

    def _options(self, site: MapSite, parts: int, overrides: Overrides) -> PeftConfig:
        """The config in force at a former layer."""
        if self._given is not None:
            return self._given.model_copy(update=dict(overrides))
        rank = getattr(site.config, "r", None)
        shared = isinstance(rank, int) and parts > 1
        return site.config.model_copy(update={"r": rank // parts}) if shared and rank is not None else site.config


def can_join(tuner: MapTuner[Any], parts: int) -> bool:
    """Whether slots of layers that were so many parts of an expert's rows can be those of all experts, and back."""
    return tuner.joins or (parts == 1 and isinstance(tuner, PerExpert))


def part_of(layer: LayerFacts, parts: int) -> LayerFacts:
    """A linear layer that was one of so many parts of one expert's rows."""
    rows = layer.out_features // parts
    weight = TensorFacts((rows, layer.in_features), next(iter(layer.params.values())).dtype)
    return LayerFacts(Kind.LINEAR, "Linear", layer.in_features, rows, params=FactsByName({"weight": weight}))


class _Patterns:
    """Options that a config has for single layers."""

    def __init__(self, config: PeftConfig) -> None:
        self._options = [
            (option, values, PatternKeys(tuple(values), Deadline(), name))
            for name, option in config.pattern_options.items()
            if (values := getattr(config, name, None))
        ]

    def of(self, path: str) -> Overrides:
        """Options in force for a layer in place of the general ones. Raises `PeftcError` for patterns that take too long."""
        found = ((option, values, keys.find(path)) for option, values, keys in self._options)
        return tuple((option, values[key]) for option, values, key in found if key is not None)


def with_ranks(config: PeftConfig, ranks: Mapping[str, int]) -> PeftConfig:
    """A compiled config with at least these ranks for single layers, by path. A pattern that is in force there is raised: files
    do not keep the order of patterns, so that another one before it would not stay there."""
    name = next(name for name, option in config.pattern_options.items() if option == "r")
    patterns = dict(getattr(config, name) or {})
    keys = PatternKeys(tuple(patterns), Deadline(), name)
    for path, rank in ranks.items():
        key = keys.find(path) or re.escape(path)
        patterns[key] = max(rank, patterns.get(key, rank))
    return config.model_copy(update={name: patterns})
