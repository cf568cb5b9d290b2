"""What a method is: a record that names its config, its mathematics and its public names.

Methods subclass `MapTuner` (they change the map of one layer), `ModuleTuner` (they act around whole modules) or `PromptTuner`
(they add virtual tokens) and give a `TunerMethod` to the registry. They never see how a layer stores its weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from peftc.config.base import PeftConfig
from peftc.config.mixins import InitWeightsMixin
from peftc.diagnostics import ConfigError, Diagnostic
from peftc.graph.nodes import Kind, LayerFacts, ModuleGraph, ModuleNode
from peftc.tuner.calls import CallTuner
from peftc.tuner.limits import RankLimit, grouped
from peftc.tuner.modules import ModuleTuner
from peftc.tuner.prompt import PromptTuner
from peftc.tuner.slots import Slot
from peftc.tuner.startable import Startable
from peftc.tuner.steps import Changes
from peftc.tuner.variant import Variant, no_problems, of_node, several

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.tuner.views import SlotInit, View

C = TypeVar("C", bound=PeftConfig)
V = TypeVar("V")

LOWERINGS = ("thin", "rescaled", "branch", "input", "output", "vectors", "params")
#: what a method may have to say beside its mathematics
SEAMS = ("begins", "on_step", "loss", "fitted", "export", "restore")


@dataclass(frozen=True, slots=True)
class Former(Generic[V]):
    """A slot on a layer that was joined with others."""

    #: its tensor
    value: V
    #: how many times larger the layer's scaling was than it is now
    ratio: float = 1.0


class MapTuner(Startable[C], ABC):
    """The mathematics of a method on one layer, stateless. Give `slots`, and at least one lowering.

    A lowering is one way to say what the adapter does to the layer's map `y = W x + b`, in logical order (`W` is
    `(out, in · kernel)` whatever the storage). The core derives the others where it can, and the conformance kit proves
    that those given agree. Which are given is read off the class once.
    """

    #: kinds of layer that the method can adapt
    supports: ClassVar[frozenset[Kind]]
    #: what `input` acts on: the layer's `"features"`, or the flattened `"patches"` that a convolution multiplies
    input_space: ClassVar[str] = "features"
    #: whether the change of the weight does not depend on the weight (`W' = W + ΔW`); thin updates are always so
    additive: ClassVar[bool] = False
    #: why a `branch` is no change of the layer's weight, where it cannot be one; for who wants to merge it
    beside: ClassVar[str] = ""
    #: whether `output` acts on `W x` alone, and the layer's bias is added afterwards as it is
    spares_bias: ClassVar[bool] = False
    #: whether `branch` costs as much as the layer itself: then `params` serves where the base is not in half precision,
    #: in which small changes of a weight would be rounded away
    branch_is_dense: ClassVar[bool] = False
    #: whether backward computes `input` again, for maps that cost little beside the tensors that they would keep
    recomputes_input: ClassVar[bool] = False
    #: whether the slots of experts (`EXPERT_KINDS`) hold all of them in a way of the method's own; else the core keeps
    #: those of a linear layer for each, and the lowerings see one expert's
    stacks_experts: ClassVar[bool] = False
    #: the option that says with which probability inputs of `branch` and `thin` are dropped in training
    dropout_option: ClassVar[str] = ""
    #: how large the rank, or what stands for it, may be on a layer; None if that does not depend on the layer
    rank_limit: ClassVar[RankLimit | None] = None
    #: whether the mathematics holds on convolutions of several groups
    takes_groups: ClassVar[bool] = True
    #: keywords of a call, with one value per row, that are for the method alone: `branch`, `input` and `output` read them
    #: by `a.of_rows`
    keywords: ClassVar[tuple[str, ...]] = ()
    #: why gradients are not the slopes of the output, where the method means them to be others; the kit does not compare them
    bent_gradients: ClassVar[str] = ""
    #: whether slots act in training alone, by numbers that are drawn there; the kit looks at gradients in training then
    draws_in_training: ClassVar[bool] = False
    #: names of the lowerings that the class gives, filled in by the core
    lowerings: ClassVar[frozenset[str]] = frozenset()
    #: names of the further seams that it gives, likewise
    seams: ClassVar[frozenset[str]] = frozenset()
    #: options that `on_step` may change: they describe what training came to
    step_options: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.lowerings = frozenset(name for name in LOWERINGS if getattr(cls, name) is not getattr(MapTuner, name))
        cls.additive = cls.additive or "thin" in cls.lowerings
        cls.seams = frozenset(name for name in SEAMS if getattr(cls, name) is not getattr(MapTuner, name))

    @abstractmethod
    def slots(self, c: C, layer: LayerFacts) -> Iterable[Slot]:
        """The storage needed on a layer. Runs in `peftc plan`; must not import torch."""

    @abstractmethod
    def init(self, c: C, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        """Fill freshly made slots (by label: the name, or `name.tail` where several share it) in place.

        Called once for each layer with something to fill. Derived slots are never among them; a shared one is for the first
        layer that has it, and not for the others.
        """

    def settle(self, c: C, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        """Fill those slots that follow from how the others, and the base, have begun. Called after `init`, with the same."""

    def declare(self, kinds: Sequence[tuple[C, LayerFacts]]) -> Sequence[Iterable[Slot]]:
        """The storage of all kinds of layer that an adapter is on, each with the options in force there, where it depends
        on all of them, as a shape that must hold the largest. Layers that are alike come once."""
        return [self.slots(c, layer) for c, layer in kinds]

    def derive(self, c: C, layer: LayerFacts, slots: Mapping[str, Slot]) -> Mapping[str, Tensor]:
        """Values of the derived slots, by label, on the CPU. Random ones come from a generator of the method's own with a
        seed of the options, never from the global one: they are computed again at each load."""
        raise NotImplementedError

    def scaling(self, c: C, layer: LayerFacts) -> float:
        """The factor that users can change at run time (`set_scale`); the lowerings find it as `a.scaling`."""
        return 1.0

    def dropout(self, c: C) -> float:
        """Probability of dropping inputs of `branch` and `thin` in training: that of `dropout_option`, if there is one."""
        return float(getattr(c, self.dropout_option)) if self.dropout_option else 0.0

    def check(self, c: C, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        """Problems of the options on this layer that no declaration of the class says."""
        return ()

    def problems(self, c: C, layer: LayerFacts, path: str) -> Iterator[Diagnostic]:
        """All problems of the options on this layer, for the core: what the class declares, and what `check` finds."""
        yield from self.declared_problems(c, layer, path)
        yield from self.check(c, layer, path)

    def declared_problems(self, c: C, layer: LayerFacts, path: str) -> Iterator[Diagnostic]:
        """Those that the class declares."""
        if layer.groups > 1 and not self.takes_groups:
            yield grouped(layer, path)
        if self.rank_limit is not None:
            yield from self.rank_limit.problems(c, layer, path)

    def clash(self, c: C, other: C) -> str:
        """What keeps two adapters with these options from acting on one layer at once; empty if nothing does."""
        return ""

    def check_call(self, c: C, values: Mapping[str, Tensor]) -> Iterable[Diagnostic]:
        """Problems of what a call gives for the `keywords`, which may be nothing. Values are integers `(rows,)`."""
        return ()

    def begins(self, c: C, ids: Tensor | None, tokens: int, values: Mapping[str, Tensor]) -> Tensor | None:
        """From which token on `thin` or `branch` acts: a place for each row of a call, `(rows,)`, `tokens` or more for none; None
        where the call does not say. `ids` `(rows, tokens)` are those of the call and of its cache, None if it has none; `values`
        are what it gives for the `keywords`. What waits cannot be merged."""
        raise NotImplementedError

    # combining ----------------------------------------------------------------------------------------------------

    def of_rank(self, c: C, rank: int) -> C | None:
        """The options of an adapter with thin factors of this rank on every layer and a scaling of 1; None if there are
        none. With `of_thin`, adapters can be combined in every way, padded, and exchanged with others of another rank."""
        return None

    def combine(self, c: C, slots: Mapping[str, Sequence[Tensor]], weights: Sequence[float]) -> Mapping[str, Tensor]:
        """One adapter's slots from those of several, `(label -> one tensor per adapter)`, with their weights. With `of_rank` they
        may be of other ranks, and what is given of any rank up to the sum of theirs."""
        raise NotImplementedError

    @property
    def has_ranks(self) -> bool:
        """Whether slots of one rank, padded with zeros, are those of a larger one that does the same."""
        return type(self).of_rank is not MapTuner.of_rank

    @property
    def is_rankable(self) -> bool:
        """Whether the method makes slots of thin factors."""
        return self.has_ranks and type(self).of_thin is not MapTuner.of_thin and "thin" in self.lowerings

    @property
    def joins(self) -> bool:
        """Whether the method makes one update of those of layers that were joined by rows."""
        return type(self).joined is not MapTuner.joined

    @property
    def is_mergeable(self) -> bool:
        """Whether the method says how the layer's parameters change, for all tokens, and not only its output."""
        return bool(self.lowerings - {"branch"}) and not self.waits

    @property
    def waits(self) -> bool:
        """Whether updates act from some token of a call on, and not for all."""
        return "begins" in self.seams

    @property
    def is_combinable(self) -> bool:
        """Whether the method combines slots in a way of its own."""
        return type(self).combine is not MapTuner.combine

    # training -----------------------------------------------------------------------------------------------------

    def on_step(self, c: C, step: int, sites: Mapping[str, View[C]], state: dict[str, Tensor]) -> Changes:
        """What is to change after the backward of optimiser step `step`, counted from 1, before gradients are zeroed.

        `sites` are the adapter's views by path; their slots have gradients. `state` is the method's own from step to step:
        the core keeps it, in checkpoints of a training too. Runs under `no_grad`; change nothing but `state` here.
        """
        return Changes()

    def loss(self, c: C, sites: Mapping[str, View[C]], outputs: Any) -> Tensor | None:
        """A scalar to add to the model's own loss, in training; `outputs` is what the model returned."""
        return None

    def schedule(self, c: C, steps: int) -> Iterable[Diagnostic]:
        """Problems of the options in a training of so many optimiser steps."""
        return ()

    # checkpoints --------------------------------------------------------------------------------------------------

    def fitted(self, c: C, layer: LayerFacts, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Slot]:
        """The slots of an adapter whose checkpoint has these shapes, by label: for methods whose `slots` are a bound.
        Shapes that do not belong together are for `slots`, so that the difference is reported. No tensor is read."""
        return self.slots(c, layer)

    def export(self, c: C, path: str, layer: LayerFacts, slots: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values that a checkpoint holds, from those of the saved slots, both by label."""
        return slots

    def restore(
        self, c: C, path: str, layer: LayerFacts, saved: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Tensor]:
        """The way back: values for slots of these shapes, from a checkpoint whose options are `c` and whose shapes differ.

        Raises `PeftcError` if the slots cannot hold them.
        """
        return saved

    def joined(self, c: C, layer: LayerFacts, label: str, experts: Sequence[Sequence[Former[Tensor] | None]]) -> Tensor:
        """A slot of experts that a module stores as one tensor (`EXPERT_KINDS`), from those of the layers that they were.

        `experts[e][p]` was on the layer that is now part p of the rows of expert e; None for one without an adapter, which
        is not changed. All that do the same to the weight is right. Only of methods whose updates of layers that were
        joined by rows are one update of the joint layer; for experts that are single layers the core stacks slots itself.
        """
        raise NotImplementedError

    def parted(
        self, c: C, layer: LayerFacts, parts: int, slots: Mapping[str, Tensor]
    ) -> Sequence[Sequence[Mapping[str, Tensor]]]:
        """The way back: `[e][p]` has the slots, by label, of an adapter on the layer that was part p of expert e. The shapes
        are alike in all of them; scalings are the site's."""
        raise NotImplementedError

    # lowerings ----------------------------------------------------------------------------------------------------

    def thin(self, a: View[C]) -> tuple[Tensor, Tensor, float]:
        """`(A, B, s)` with `ΔW = s · B A`, A `(r, in · kernel)`, B `(out, r)`. The core fuses, merges and batches it."""
        raise NotImplementedError

    def rescaled(self, a: View[C]) -> tuple[Tensor, Tensor, float, Tensor]:
        """`(A, B, s, g)` with `W' = g ∘ (W + s · B A)`: every row of the updated weight multiplied by its entry of g `(out,)`.
        The layer's bias stays as it is."""
        raise NotImplementedError

    def branch(self, a: View[C], x: Tensor, y0: Tensor) -> Tensor:
        """`Δy` to add to the layer's output, from its input (ids, of an embedding) and its output so far.

        `x` is in the dtype of the adapter's first slot, `y0` in what the layer gives, which may be half precision beside slots
        in float32: cast it to compute with it. `Δy` may be of either; the sum is cast to the dtype of `y0`.
        """
        raise NotImplementedError

    def input(self, a: View[C], x: Tensor) -> Tensor:
        """A linear map of the layer's input, features (or patches, see `input_space`) in the last dimension. `x` is in the
        dtype of the adapter's first slot, and what is returned is cast to that of the input."""
        raise NotImplementedError

    def output(self, a: View[C], y: Tensor) -> Tensor:
        """A linear map of the layer's output, features in the last dimension; of the bias as well, unless `spares_bias`. It may
        add a constant, which is merged into the bias: a layer without one gets it, if its kind has any. What is neither is
        not merged; then give `branch`. Dtypes as of `input`."""
        raise NotImplementedError

    def vectors(self, a: View[C]) -> tuple[Tensor, Tensor]:
        """`(index, values)`: the layer's vectors at `index` `(n,)` are `values` `(n, size)` instead of its own. Those of an
        embedding belong to its ids, those of a linear layer are the rows of W, one for each output. Indices differ."""
        raise NotImplementedError

    def params(self, a: View[C], w: Mapping[str, Tensor], w0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The layer's parameters `w` (running) and `w0` (pristine) -> the adapted ones; weight is `(out, in · kernel)`. All are
        in the wider of the base's dtype and that of the adapter's first slot. Names that are not in `w` are an error."""
        raise NotImplementedError


def nothing_left_out(config: Any, graph: ModuleGraph) -> Mapping[str, Any]:
    """The default `resolve` of a method."""
    return {}


def starts_as_base(config: Any) -> bool:
    """The default `identity_at_start` of methods on layers and modules: what `init_weights` says, where it is an option."""
    return config.init_weights if isinstance(config, InitWeightsMixin) else True


def never(config: Any) -> bool:
    """That of all others."""
    return False


def no_values(config: Any, rows: int) -> Mapping[str, Sequence[int]]:
    """The default of methods that read nothing of a call."""
    return {}


#: A method's mathematics: for all that it adapts, for several kinds of layer, or chosen by config and node.
Mathematics: TypeAlias = (
    MapTuner[Any]
    | tuple[MapTuner[Any], ...]
    | ModuleTuner[Any]
    | PromptTuner[Any]
    | CallTuner[Any]
    | Callable[[Any, ModuleNode], MapTuner[Any]]
)


@dataclass(frozen=True)
class TunerMethod:
    """A method's record: all that the core knows of it."""

    #: the name of the method, in upper case; the entry point has it in lower case
    peft_type: str
    #: the class of its options, whose `peft_type` has this name for a default
    config: type[PeftConfig]
    #: the mathematics; or several for different kinds of layer, of which the first that supports a layer's kind is taken; or
    #: a function that chooses one of `choices` by config and node
    tuner: Mathematics
    #: all that a function in `tuner` may choose
    choices: tuple[MapTuner[Any], ...] = field(default=(), kw_only=True)
    #: other mathematics over the same options, that the method brings itself; of all variants at most one acts
    variants: tuple[Variant[MapTuner[Any]], ...] = field(default=(), kw_only=True)
    #: what the name of every slot that is a parameter begins with (`"lora_"`); empty for prompts
    prefix: str
    #: `adapter_layer_names` of the layer class: slots that hold trainable tensors
    layer_names: tuple[str, ...] = ()
    #: public name of the empty model class, for `isinstance`; left out, the one that goes with the config's
    model_class: str = ""
    #: public name of the empty layer class, likewise
    layer_class: str = ""
    #: public name of the empty class of prompt encoders, likewise
    encoder_class: str = ""
    #: options that the layer class shows by adapter, as they are in force there: attribute -> option
    layer_options: Mapping[str, str] = field(default_factory=dict)
    #: the attribute that shows what drops inputs, by adapter, for methods that do; left out, the tuners' `dropout_option`
    layer_dropout: str = ""
    #: methods of the model class beyond those that all have: name -> a function whose first argument is the model
    model_methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    #: further public names of the method, e.g. its enums and helper functions, and what they stand for
    exports: Mapping[str, Any] = field(default_factory=dict)
    #: option -> name of its table of defaults by model type, in `peftc/graph/default_targets.json`; each of the reference's
    #: methods has one, and one of a plugin may take any of them
    default_targets: Mapping[str, str] = field(default_factory=dict)
    #: options that all adapters of the method on one model must have alike
    alike: tuple[str, ...] = ()
    #: what the method does, in one sentence, for lists of methods
    summary: str = ""
    #: where it was published, e.g. `"arXiv:2405.17604"`
    paper: str = ""
    #: tags that the hub knows the method by; they go into the model card
    tags: tuple[str, ...] = ()
    #: configs that the conformance kit uses besides its own
    examples: tuple[Mapping[str, Any], ...] = ()
    #: options, with their `peft_type`, of adapters that the kit makes for the method to weigh
    example_adapters: tuple[Mapping[str, Any], ...] = ()
    #: what the kit's calls give for the mathematics' `keywords`: options and number of rows -> values by keyword
    example_values: Callable[[Any, int], Mapping[str, Sequence[int]]] = no_values
    #: problems of the options that need no model: contradictions, options this version does not have
    check: Callable[[Any], Iterable[Diagnostic]] = no_problems
    #: problems of the options that say how a fresh adapter begins, and nothing else: not asked where all is loaded
    check_start: Callable[[Any], Iterable[Diagnostic]] = no_problems
    #: the option that may name a start, for methods that make slots of thin factors (`of_thin`)
    start_option: str = ""
    #: texts among its values that are the method's own
    own_starts: tuple[str, ...] = ()
    #: options that the config leaves out, from the model, for methods on layers; they are saved with the adapter. Raises
    #: `PeftcError` where the model does not tell
    resolve: Callable[[Any, ModuleGraph], Mapping[str, Any]] = nothing_left_out
    #: whether layers that share their weight with an adapted one are adapted along; for slots with `Share.WEIGHT`
    follows_ties: bool = False
    #: whether a fresh adapter with this config leaves the model's output as it was; left out, as `init_weights` says, where
    #: that is an option, and never of prompts and of methods around calls
    identity_at_start: Callable[[Any], bool] = starts_as_base

    def __post_init__(self) -> None:
        if self.identity_at_start is starts_as_base and (self.is_prompt or self.call_tuner is not None):
            object.__setattr__(self, "identity_at_start", never)
        if isinstance(self.choices, tuple) and not self.layer_dropout:  # the registry refuses other choices
            dropping = next((tuner.dropout_option for tuner in self.map_tuners if tuner.dropout_option), "")
            object.__setattr__(self, "layer_dropout", dropping)
        if self.is_prompt or not isinstance(self.config, type):  # the registry refuses the latter
            return
        stem = self.config.__name__.removesuffix("Config")
        object.__setattr__(self, "model_class", self.model_class or f"{stem}Model")
        if self.call_tuner is None:
            object.__setattr__(self, "layer_class", self.layer_class or f"{stem}Layer")

    @property
    def is_prompt(self) -> bool:
        """Whether it adds virtual tokens."""
        return isinstance(self.tuner, PromptTuner)

    @property
    def module_tuner(self) -> ModuleTuner[Any] | None:
        """The mathematics around whole modules, of methods that have some."""
        return self.tuner if isinstance(self.tuner, ModuleTuner) else None

    @property
    def call_tuner(self) -> CallTuner[Any] | None:
        """The mathematics around calls, of methods that have some."""
        return self.tuner if isinstance(self.tuner, CallTuner) else None

    @property
    def adapts_layers(self) -> bool:
        """Whether the method changes the maps of layers."""
        return not isinstance(self.tuner, (ModuleTuner, PromptTuner, CallTuner))

    @property
    def map_tuners(self) -> tuple[MapTuner[Any], ...]:
        """All mathematics on layers that the method has."""
        given = self.tuner if isinstance(self.tuner, tuple) else (self.tuner,)
        of_variants = (tuner for variant in self.variants for tuner in variant.tuners)
        return (*(tuner for tuner in given if isinstance(tuner, MapTuner)), *self.choices, *of_variants)

    @property
    def only_tuner(self) -> MapTuner[Any] | None:
        """The one mathematics that the method has for all configs and layers, if it has one."""
        return self.tuner if isinstance(self.tuner, MapTuner) and not self.variants else None

    @property
    def is_rankable(self) -> bool:
        """Whether adapters of the method can be made of thin factors, if not on every layer."""
        return any(tuner.is_rankable for tuner in self.map_tuners)

    @property
    def supports(self) -> frozenset[Kind]:
        """Kinds of layer that the method can adapt. Attention consists of single parameters and a linear layer."""
        found = frozenset(kind for tuner in self.map_tuners for kind in tuner.supports)
        return found | {Kind.ATTENTION} if {Kind.EXPERTS, Kind.LINEAR} <= found else found

    @property
    def public_names(self) -> dict[str, str]:
        """Public name -> what it is: `"config"`, `"model"`, `"layer"`, `"encoder"`, or `"export"`."""
        names = {self.config.__name__: "config", self.model_class: "model", self.layer_class: "layer"}
        names[self.encoder_class] = "encoder"
        return {name: role for name, role in names.items() if name} | dict.fromkeys(self.exports, "export")

    def least(self, **options: Any) -> PeftConfig:
        """A config with these options, and with those that it needs beside them."""
        return self.config(**self.needed(options), **options)

    def needed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the first example's options that a config with the given ones cannot be made without."""
        try:
            self.config(**options)
        except ConfigError as error:
            missed = {told.where.path for told in error.diagnostics} - options.keys()
            return {name: value for example in self.examples[:1] for name, value in example.items() if name in missed}
        return {}

    def chosen_for(self, config: PeftConfig, node: ModuleNode) -> MapTuner[Any]:
        """The mathematics that the method gives for a site; `peftc.tuner.experts.tuner_for` has it for experts as well."""
        if isinstance(self.tuner, (ModuleTuner, PromptTuner, CallTuner)):
            raise TypeError(f"{self.peft_type} has no map sites")
        variant = self.variant_for(config)
        return of_node(self.tuner, config, node) if variant is None else of_node(variant.tuner, config, node)

    def variant_for(self, config: PeftConfig) -> Variant[MapTuner[Any]] | None:
        """The variant that a config chooses; None for the method's own mathematics."""
        return next((variant for variant in self.variants if variant.acts(config)), None)

    def with_variant(self, variant: Variant[MapTuner[Any]]) -> TunerMethod:
        """The same method with a variant more, which others have brought."""
        return replace(self, variants=(*self.variants, variant))

    def problems(self, config: PeftConfig) -> Iterator[Diagnostic]:
        """All problems of the options that need no model, for the core."""
        yield from self.check(config)
        acting = [variant for variant in self.variants if variant.acts(config)]
        yield from several(acting)
        for variant in acting:
            yield from variant.problems(config)
