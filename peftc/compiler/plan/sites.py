"""What a plan does at one place: a layer or module that gets slots, a copy, a base parameter that trains, a prompt, a call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from peftc.config.base import PeftConfig
from peftc.graph.nodes import Kind, LayerFacts, ModuleGraph, ModuleNode, Role
from peftc.graph.tensors import HALF, TensorFacts
from peftc.tuner.experts import tuner_for
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import TunerMethod
from peftc.tuner.prompt import Place
from peftc.tuner.rows import ROWS_BESIDE
from peftc.tuner.slots import Key, Slot
from peftc.tuner.transposed import transposed

#: What stands before a module path in a wrapped model, in memory and in every checkpoint.
WRAPPED_ROOT = "base_model.model."
#: The same for a model that only prompt methods adapt: it has one level less.
PROMPT_ROOT = "base_model."


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """A parameter that the applied model has and its base has not, or that changes its trainability.

    `name` is as in `named_parameters` of the wrapped model, `aliases` further names there of the same tensor; `disk` the
    checkpoint's key, None if it is not saved; `base` says that the parameter exists without the adapter.
    """

    name: str
    disk: str | None
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    adapter: str
    base: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return TensorFacts(self.shape, self.dtype).numel


@dataclass(frozen=True, slots=True)
class MapSite:
    """A layer that gets an adapter. Sites with equal layers and options share `layer`, `config` and `slots`.

    `config` holds the options in force here (`overrides` applied) and is never changed; `dtype` is the slots' dtype.
    `reason` is the entry that meant the layer, `role` what the layer is for, where that is known.

    A site may be on a single `parameter` of its module. Then there are `outside` wrappers of the same adapter round its own,
    for parameters that the module has after it. `place` is where the module is under wrappers of the adapter that are round
    modules around it; empty if there are none.

    Rows that train beside the method's mathematics are a site of their own, whose slots are `inside` a module of that name
    in a wrapper directly round the layer.

    A layer `tied` to an embedding has the slots of the adapter on that. `mirrors` are the names of the slots that it would have
    of its own, each with that of which it is the transpose: checkpoints have both.
    """

    path: str
    layer: LayerFacts
    config: PeftConfig
    slots: tuple[Slot, ...]
    dtype: str
    reason: str
    overrides: tuple[tuple[str, Any], ...] = ()
    role: Role | None = None
    parameter: str = ""
    outside: int = 0
    place: str = ""
    inside: str = ""
    tied: str = ""
    mirrors: tuple[tuple[str, str], ...] = ()

    @property
    def owner(self) -> str:
        """The module that has the slots, in terms of the base model: what tells sites on parameters of one module apart."""
        return self.under(0)

    def under(self, wrappers: int) -> str:
        """The same below so many wrappers of others."""
        outermost = (self.place or self.path) + ".base_layer" * (self.outside + wrappers)
        return f"{outermost}.{self.inside}" if self.inside else outermost

    @property
    def spot(self) -> str:
        """What tells the adapter's sites at one path apart: the parameter, or where the slots are; empty for the layer."""
        return self.parameter or self.inside

    def tuner(self, method: TunerMethod, config: PeftConfig, graph: ModuleGraph) -> MapTuner[Any]:
        """The mathematics here, of an adapter with these options."""
        if self.inside:
            return ROWS_BESIDE
        if not self.tied:
            return tuner_for(method, config, self.node(graph))
        tuner = tuner_for(method, config, graph.by_path[self.tied])
        return tuner if self.layer.kind is Kind.EMBEDDING else transposed(tuner)

    def node(self, graph: ModuleGraph) -> ModuleNode:
        """What the mathematics is chosen by: the module, or the parameter as a module of its own."""
        node = graph.by_path[self.path]
        return node.of_parameter(self.parameter, self.layer) if self.parameter else node

    def key(self, slot: Slot, adapter: str) -> Key:
        return Key(self.owner, slot.name, adapter, slot.tail, slot.home, slot.stored_tail)

    def kept_key(self, name: str) -> str:
        """The key of a tensor that a change of the base weight follows from; no slot's has a colon."""
        return f"{self.owner}:{name}"


@dataclass(frozen=True, slots=True)
class ModuleSite:
    """A module that is wrapped: `inner` is what it is called inside the wrapper, which holds the slots.

    Sites with equal modules share `layer`, `config` and `slots`. `layer` has the facts of the module itself.
    """

    path: str
    layer: LayerFacts
    config: PeftConfig
    slots: tuple[Slot, ...]
    dtype: str
    inner: str
    reason: str
    role: Role | None = None

    def key(self, slot: Slot, adapter: str) -> Key:
        return Key(self.path, slot.name, adapter if slot.named else "", slot.tail)


@dataclass(frozen=True, slots=True)
class SaveSite:
    """A module that is copied and trained whole. `tensors` are all parameters below it by their path from it, as they are
    in the module and in a checkpoint; in a `lifted` copy what is in half precision is in float32. `tied` are those that are one
    with a parameter of another copy, by the base model's name of that."""

    path: str
    tensors: tuple[tuple[str, TensorFacts], ...]
    buffers: tuple[tuple[str, TensorFacts], ...]
    reason: str
    lifted: bool = False
    tied: tuple[tuple[str, str], ...] = ()

    def copied(self) -> Iterator[tuple[str, TensorFacts]]:
        """Parameters that are the copy's own."""
        tied = {tail for tail, _ in self.tied}
        for tail, facts in self.tensors:
            if tail in tied:
                continue
            yield tail, replace(facts, dtype="float32") if self.lifted and facts.dtype in HALF else facts

    def key(self, tail: str, adapter: str) -> Key:
        return Key(self.path, "modules_to_save", adapter, tail)


@dataclass(frozen=True, slots=True)
class TrainSite:
    """A base parameter that becomes trainable and is saved. `wrapped` if its module is also a map site; `place` as a map
    site's. `copies` are the further names under which the base has it, as `base_name`: a checkpoint has it under all."""

    path: str
    name: str
    tensor: TensorFacts
    wrapped: bool
    reason: str
    place: str = ""
    copies: tuple[str, ...] = ()

    @property
    def base_name(self) -> str:
        """Its name in the adapted base model: a wrapper puts `base_layer` before it."""
        place = self.place or self.path
        owner = f"{place}.base_layer" if self.wrapped else place
        return f"{owner}.{self.name}" if owner else self.name


@dataclass(frozen=True, slots=True)
class PromptSite:
    """Virtual tokens: slots of the encoder, at the root of the model, and where they go.

    `disk` is the key of the table that is saved, `shape` its shape; `extra` are shapes of what is saved beside it, by key.
    `embeddings` is the path of the input embeddings.
    """

    slots: tuple[Slot, ...]
    dtype: str
    disk: str
    shape: tuple[int, ...]
    embeddings: str
    place: Place = Place.INPUT
    extra: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def disk_of(self, slot: Slot) -> str | None:
        """The key that a slot is saved under; None if only what is computed from it and others is."""
        if slot.name in dict(self.extra):
            return slot.name
        others = [other for other in self.slots if other.name not in dict(self.extra)]
        return self.disk if len(others) == 1 else None

    @property
    def stored(self) -> dict[str, TensorFacts]:
        """What a checkpoint holds of it, by key."""
        return {key: TensorFacts(shape, self.dtype) for key, shape in ((self.disk, self.shape), *self.extra)}


@dataclass(frozen=True, slots=True)
class CallSite:
    """Storage of an adapter that acts around calls, at the root of the model as `owner`.

    `needs` are the adapters that it weighs, `layers` the paths of those layers that they change, in the model's order.
    """

    owner: str
    slots: tuple[Slot, ...]
    dtype: str
    needs: tuple[str, ...]
    layers: tuple[str, ...]

    def memory(self, label: str, adapter: str) -> str:
        """The name of a slot in the wrapped model."""
        return f"{PROMPT_ROOT}{self.owner}.{adapter}.{label}"

    def disk(self, label: str) -> str:
        """The key of a slot in a checkpoint."""
        return f"{PROMPT_ROOT}{self.owner}.{label}"
