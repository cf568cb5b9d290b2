"""What a method is: a record that names its config, its mathematics and its public names.

Methods subclass `MapTuner` (they change the map of one layer), `ModuleTuner` (they act around whole modules) or `PromptTuner`
(they add virtual tokens) and give a `TunerMethod` to the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from peftc.config.base import PeftConfig
from peftc.config.mixins import InitWeightsMixin
from peftc.diagnostics import ConfigError, Diagnostic
from peftc.graph.nodes import Kind, ModuleGraph, ModuleNode
from peftc.tuner.calls import CallTuner
from peftc.tuner.maps import MapTuner
from peftc.tuner.modules import ModuleTuner
from peftc.tuner.prompt import PromptTuner
from peftc.tuner.variant import Variant, no_problems, of_node, several


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
        return (*self.plain_tuners, *(tuner for variant in self.variants for tuner in variant.tuners))

    @property
    def plain_tuners(self) -> tuple[MapTuner[Any], ...]:
        """The method's own mathematics on layers, without that of variants."""
        given = self.tuner if isinstance(self.tuner, tuple) else (self.tuner,)
        return (*(tuner for tuner in given if isinstance(tuner, MapTuner)), *self.choices)

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
