"""All that one adapter does: its sites, and every tensor that they give the model and a checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peftc.compiler.plan.rewrite import Rewrite
from peftc.compiler.plan.sites import (
    PROMPT_ROOT,
    WRAPPED_ROOT,
    CallSite,
    MapSite,
    ModuleSite,
    PlannedParameter,
    PromptSite,
    SaveSite,
    TrainSite,
)
from peftc.config.base import PeftConfig
from peftc.graph.nodes import ModelFacts
from peftc.graph.tensors import TensorFacts
from peftc.tuner.slots import Key, Share, Slot

#: An adapter that adapts an embedding of one of these names has its embeddings saved whole: the reference goes by the name.
VOCABULARY_NAMES = frozenset({"embed_tokens", "lm_head"})
#: Options that train single rows of an embedding, so that the whole of it need not be saved.
_ROW_OPTIONS = ("trainable_token_indices", "token_indices")


def trains_rows(config: PeftConfig) -> bool:
    """Whether single rows of embeddings are trained."""
    return any(getattr(config, option, None) is not None for option in _ROW_OPTIONS)


@dataclass(frozen=True)
class Tally:
    """Numbers of parameters by dtype: those that an adapter adds to the model, and those that it trains."""

    added: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    #: how many trained tensors there are of each shape and dtype
    shapes: Counter[tuple[tuple[int, ...], str]] = field(default_factory=Counter)

    def count(self, dtype: str, shape: tuple[int, ...], trainable: bool = True, times: int = 1) -> None:
        """Count tensors that are added."""
        self.added[dtype] += math.prod(shape) * times
        if trainable:
            self.train(dtype, shape, times)

    def train(self, dtype: str, shape: tuple[int, ...], times: int = 1) -> None:
        """Count tensors that are trained."""
        self.trained[dtype] += math.prod(shape) * times
        self.shapes[shape, dtype] += times


@dataclass(frozen=True)
class AdapterPlan:
    """All that one adapter does. `config` is as given, with defaults resolved; it is what is saved.

    One that another adapter weighs is `needed_by` that, and read from `origin`; it comes and goes with it.
    `notes` tell a reader what was decided that no option says. `rewrites` say which targets
    were given by former names.
    """

    name: str
    peft_type: str
    config: PeftConfig
    maps: tuple[MapSite, ...] = ()
    saves: tuple[SaveSite, ...] = ()
    trains: tuple[TrainSite, ...] = ()
    prompt: PromptSite | None = None
    modules: tuple[ModuleSite, ...] = ()
    call: CallSite | None = None
    needed_by: str = ""
    origin: str = ""
    rewrites: tuple[Rewrite, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[MapSite | ModuleSite, ...]:
        """Every module that gets slots."""
        return (*self.maps, *self.modules)

    @property
    def paths(self) -> Iterator[str]:
        """The path of every module that it does something to."""
        yield from (site.path for site in self.sites)
        yield from (save.path for save in self.saves)
        yield from (train.path for train in self.trains)

    @property
    def root(self) -> str:
        """What stands before module paths in the wrapped model."""
        return PROMPT_ROOT if self.prompt is not None or self.call is not None else WRAPPED_ROOT

    @property
    def nests(self) -> bool:
        """Whether it acts on single layers alone, so that wrappers of another method can be round its own."""
        return self.prompt is None and not self.modules and self.call is None and not self.adapts_parameters

    @property
    def adapts_parameters(self) -> bool:
        """Whether it adapts single parameters of modules: their module computes all rows at once, with all of them."""
        return any(site.parameter for site in self.maps)

    def is_like(self, other: AdapterPlan, free: Collection[str] = ()) -> bool:
        """Whether the other plan gives the same tensors the same meaning: only the values, and `free` options, may differ."""
        about = {"inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", *free}
        options, others = (
            {key: value for key, value in plan.config.to_dict().items() if key not in about} for plan in (self, other)
        )
        mine, theirs = ([*plan.parameters(), *plan.buffers()] for plan in (self, other))
        return options == others and mine == theirs

    def parameters(
        self, trainable: bool = True, active: bool = True, depth: Mapping[str, int] | None = None
    ) -> Iterator[PlannedParameter]:
        """Every parameter that this adapter adds or trains, once; `trainable=False` for one that is loaded frozen.

        With `active=False`, those that it has in the model while it is not active: slots that are not `named` are missing.
        `depth` counts wrappers of other methods round its own, by path.
        """
        root = self.root
        depth = nesting([self]).get(self.name, {}) if depth is None else depth
        yield from self._of_slots(False, trainable, active, depth)
        for save in self.saves:
            for tail, tensor in save.copied():
                name, disk = save.key(tail, self.name).memory(root), f"{root}{save.path}.{tail}"
                yield PlannedParameter(name, disk, tensor.shape, tensor.dtype, trainable, self.name)
        for train in self.trains:
            name = f"{root}{train.base_name}"
            yield PlannedParameter(name, name, train.tensor.shape, train.tensor.dtype, trainable, self.name, base=True)
        if self.prompt is not None:
            for slot in self.prompt.slots:
                key = Key("prompt_encoder", "", self.name, f"{slot.name}.{slot.tail}" if slot.tail else slot.name)
                dtype, table = slot.dtype or self.prompt.dtype, self.prompt.disk_of(slot)
                yield PlannedParameter(key.memory(), table, slot.shape, dtype, slot.trainable and trainable, self.name)
        for slot in () if self.call is None else self.call.slots:
            assert self.call is not None
            place = self.call.memory(slot.dotted, self.name)
            key_on_disk = self.call.disk(slot.dotted) if slot.saved else None
            dtype = slot.dtype or self.call.dtype
            yield PlannedParameter(place, key_on_disk, slot.shape, dtype, slot.trainable and trainable, self.name)

    def buffers(self, depth: Mapping[str, int] | None = None) -> Iterator[PlannedParameter]:
        """Every derived tensor that this adapter adds, once, as `parameters` lists those that are parameters."""
        depth = nesting([self]).get(self.name, {}) if depth is None else depth
        return self._of_slots(True, False, True, depth)

    def _of_slots(
        self, derived: bool, trainable: bool, active: bool, depth: Mapping[str, int]
    ) -> Iterator[PlannedParameter]:
        aliases = self._aliases(depth)
        for site, slot in self.slots():
            if slot.derived is not derived or not (slot.named or active):
                continue
            key = site.key(slot, self.name)
            disk = key.disk(WRAPPED_ROOT) if slot.saved else None
            others = () if slot.home is None else tuple(aliases[slot.label][1:])
            owner = site.under(depth.get(_seat(site), 0)) if isinstance(site, MapSite) else key.owner
            name = replace(key, owner=owner).memory(self.root)
            dtype = slot.dtype or site.dtype
            yield PlannedParameter(
                name, disk, slot.shape, dtype, slot.trainable and trainable, self.name, aliases=others
            )

    def slots(self) -> Iterator[tuple[MapSite | ModuleSite, Slot]]:
        """Every tensor of a slot once: a shared one at the first site that has it."""
        seen: set[object] = set()
        for site in self.sites:
            for slot in site.slots:
                if slot.home is not None:
                    if slot.label in seen:
                        continue
                    seen.add(slot.label)
                yield site, slot

    def _aliases(self, depth: Mapping[str, int]) -> dict[tuple[str, str, str | None], list[str]]:
        """Names in memory of each shared tensor, in the order of the model; its own level comes last."""
        names: dict[tuple[str, str, str | None], list[str]] = {}
        for site in self.maps:
            for slot in site.slots:
                if slot.home is not None:
                    key = replace(site.key(slot, self.name), owner=site.under(depth.get(_seat(site), 0)))
                    names.setdefault(slot.label, []).append(key.memory(self.root))
        for (slot_name, tail, home), found in names.items():
            if home == "":
                found.append(Key("", slot_name, self.name, tail).memory(PROMPT_ROOT))
        return names

    def copies(self) -> dict[str, str]:
        """Keys under which a checkpoint holds a tensor once more, each with the tensor's own key: layers with tied weights
        that have the tensor together, and copies of modules that have it."""
        of_saves = {
            f"{self.root}{save.path}.{tail}": f"{self.root}{home}" for save in self.saves for tail, home in save.tied
        }
        of_saves |= {
            f"{self.root}{copy}": f"{self.root}{train.base_name}" for train in self.trains for copy in train.copies
        }
        return of_saves | {
            replace(key, home=None).disk(WRAPPED_ROOT): key.disk(WRAPPED_ROOT)
            for site in self.maps
            for slot in site.slots
            if slot.share == Share.WEIGHT and slot.saved and slot.home not in (None, site.path)
            for key in (site.key(slot, self.name),)
        }

    def mirrors(self) -> dict[str, str]:
        """Keys under which a checkpoint holds the transpose of a tensor, each with the tensor's own key."""
        return {
            f"{WRAPPED_ROOT}{site.path}.{name}": f"{WRAPPED_ROOT}{site.tied}.{own}"
            for site in self.maps
            for name, own in site.mirrors
        }

    def tally(self, active: bool = True) -> Tally:
        """Numbers of parameters by dtype, as `parameters` lists them; layers of one kind are looked at once."""
        tally = Tally()
        kinds = Counter((id(site.slots), site.dtype) for site in self.sites)
        seen: set[object] = set()
        for site in {(id(site.slots), site.dtype): site for site in self.sites}.values():
            for slot in site.slots:
                if slot.derived or slot.label in seen or not (slot.named or active):
                    continue
                shared = slot.home is not None
                seen |= {slot.label} if shared else set()
                times = 1 if shared else kinds[id(site.slots), site.dtype]
                tally.count(slot.dtype or site.dtype, slot.shape, slot.trainable, times)
        for save in self.saves:
            for _, facts in save.copied():
                tally.count(facts.dtype, facts.shape)
        for train in self.trains:
            tally.train(train.tensor.dtype, train.tensor.shape)
        if self.prompt is not None:
            for slot in self.prompt.slots:
                tally.count(slot.dtype or self.prompt.dtype, slot.shape, slot.trainable)
        for slot in () if self.call is None else self.call.slots:
            assert self.call is not None
            tally.count(slot.dtype or self.call.dtype, slot.shape, slot.trainable)
        return tally

    def stored(self, model: ModelFacts) -> Iterator[tuple[str, TensorFacts]]:
        """Every tensor of the checkpoint: its key and facts. `model` tells which of the layers are embeddings."""
        known: dict[tuple[int, str], list[tuple[Slot, TensorFacts]]] = {}
        shared: dict[str, TensorFacts] = {}
        for site in self.sites:
            slots = known.get((id(site.slots), site.dtype))
            if slots is None:
                facts_of = [(slot, TensorFacts(slot.shape, slot.dtype or site.dtype)) for slot in site.slots]
                slots = known[id(site.slots), site.dtype] = [(slot, facts) for slot, facts in facts_of if slot.saved]
            for slot, facts in slots:
                key = site.key(slot, self.name).disk(WRAPPED_ROOT)
                if slot.home is not None:
                    if key in shared:
                        continue
                    shared[key] = facts
                yield key, facts
        for save in self.saves:  # with those that are tied
            for tail, facts in (*save.tensors, *save.buffers):
                yield f"{self.root}{save.path}.{tail}", facts
        for train in self.trains:
            yield from ((f"{self.root}{name}", train.tensor) for name in (train.base_name, *train.copies))
        if self.prompt is not None:
            yield from self.prompt.stored.items()
        for slot in () if self.call is None else self.call.slots:
            assert self.call is not None
            if slot.saved:
                yield self.call.disk(slot.dotted), TensorFacts(slot.shape, slot.dtype or self.call.dtype)
        yield from ((copy, shared[key]) for copy, key in self.copies().items() if key in shared)
        for copy, key in self.mirrors().items():
            yield copy, replace(shared[key], shape=shared[key].shape[::-1])
        vocabulary = [s for s in self.maps if s.path in (model.input_embeddings, model.output_embeddings)]
        by_name = any(layer.path.rpartition(".")[2] in VOCABULARY_NAMES for layer in vocabulary)
        if by_name and not trains_rows(self.config):
            for layer in vocabulary:
                for name, facts in layer.layer.params.items():
                    yield f"{self.root}{layer.path}.base_layer.{name}", facts


def _seat(site: MapSite) -> str:
    """What the number of wrappers round a site's own is found by."""
    return f"{site.path}.{site.inside}" if site.inside else site.path


def nesting(adapters: Sequence[AdapterPlan]) -> dict[str, dict[str, int]]:
    """Adapter -> path -> how many other wrappers are round its own, where there are any: of other methods, and round rows
    that train beside a method all that are there, which go by their path and where they are in the wrapper.

    Adapters are added in this order: one of the method that was last at a path joins its wrapper, another goes round it.
    """
    rows = [(adapter.name, site) for adapter in adapters for site in adapter.maps if site.inside]
    if len({adapter.peft_type for adapter in adapters}) < 2 and not rows:
        return {}
    levels: dict[str, list[str]] = {}
    level_of: dict[str, dict[str, int]] = {adapter.name: {} for adapter in adapters}
    for adapter in adapters:
        for site in (site for site in adapter.maps if not site.inside):
            types = levels.setdefault(site.path, [])
            if types[-1:] != [adapter.peft_type]:
                types.append(adapter.peft_type)
            level_of[adapter.name][site.path] = len(types)
    around = {name: {path: len(levels[path]) - level for path, level in own.items()} for name, own in level_of.items()}
    for name, site in rows:
        around[name][_seat(site)] = len(levels.get(site.path, ()))
    return around
