"""Options that many methods share. A config takes the mixins it needs; each has its pass in the compiler.

Meaning and defaults are the reference's; the compiler asks `isinstance(config, Mixin)` and never for a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from peftc.config.base import ConfigModel, PeftConfig


def _as_set(value: Any) -> Any:
    if not isinstance(value, (list, tuple, frozenset)):
        return value
    try:
        return set(value)
    except TypeError:  # an entry that is no name: pydantic says so
        return value


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, set, frozenset)) else value


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


#: A set of module names, or one regular expression. A list in a file; a set in memory, as in the reference.
Names = Annotated[
    set[str] | str | None, BeforeValidator(_as_set), PlainSerializer(_sorted, when_used="json", return_type=Any)
]
#: Names in an order. A list in a file; other collections are taken as well.
NameList = Annotated[list[str] | None, BeforeValidator(_as_list)]
#: A number of at least one, such as a rank.
Count = Annotated[int, Field(ge=1)]
#: The option that a method names as its `dropout_option`, or another of the kind.
Dropout = Annotated[
    float, Field(ge=0.0, lt=1.0, description="Probability of dropping inputs of the update in training.")
]


class TargetNamesMixin(ConfigModel):
    """Which modules are adapted."""

    target_modules: Names = None
    """Names (a module matches by its full path or by a suffix at a dot), one regular expression over the full path, or
    `all-linear`. Left out: the default for the model's type, or by role: attention's query and value for most methods."""


class TargetsMixin(TargetNamesMixin):
    """Which modules are adapted, and which of those are not."""

    exclude_modules: Names = None
    """Names or one regular expression of modules that are left alone although they match."""


class OwnExclusionsMixin(TargetsMixin):
    """The same where the reference's config has no `exclude_modules`: files that make no use of it are as the reference's."""

    exclude_modules: Names = Field(default=None, exclude_if=lambda value: value is None)
    """Names or one regular expression of modules that are left alone although they match."""


class TargetParametersMixin(ConfigModel):
    """Which single parameters are adapted, where a module keeps several weights of its own, as fused experts do."""

    target_parameters: NameList = None
    """Names of parameters, e.g. `mlp.experts.down_proj`: full names or suffixes at a dot. For experts that a module stores as
    one tensor, which module names do not reach."""


class ExpertsMixin(TargetParametersMixin):
    """The same where the reference's config has no such option: files that make no use of it are as the reference's."""

    @model_serializer(mode="wrap")
    def _as_the_reference(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        options: dict[str, Any] = handler(self)
        if self.target_parameters is None:
            options.pop("target_parameters", None)
        return options


class VariantMixin(ConfigModel):
    """Another mathematics over the same options, brought by another package. Files that make no use of it are as the
    reference's, which does not know it."""

    variant: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Name of a variant of the method that an installed package brings (`peftc.variants`)."""
    variant_options: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """What that variant can be told."""

    @model_validator(mode="after")
    def _options_are_of_a_variant(self) -> Self:
        if self.variant_options and not self.variant:
            raise ValueError("`variant_options` needs `variant`: without it, it has no effect")
        return self


class LayersMixin(ConfigModel):
    """Restrict the targets to some of the model's layers."""

    layers_to_transform: Annotated[list[int] | int | None, BeforeValidator(_as_list)] = None
    """Indices of the layers to adapt; only with `target_modules` as a list."""
    layers_pattern: Annotated[list[str] | str | None, BeforeValidator(_as_list)] = None
    """Name of the list of layers (`layers`, `h`), when it is not the first numbered one in the path."""

    @model_validator(mode="after")
    def _layers_need_names(self) -> Self:
        targets = getattr(self, "target_modules", None)
        if isinstance(targets, str) and targets.lower() != "all-linear":
            given = {"layers_to_transform": self.layers_to_transform is not None, "layers_pattern": self.layers_pattern}
            beside = " and ".join(f"`{name}`" for name, there in given.items() if there)
            if beside:
                raise ValueError(f"{beside} cannot be used when `target_modules` is a str, a regular expression")
        elif self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: without it, it has no effect")
        return self


class ModulesToSaveMixin(ConfigModel):
    """Modules that are trained whole and saved with the adapter."""

    modules_to_save: NameList = None
    """Names (or suffixes at a dot) of modules that are copied, trained whole and saved along, e.g. a new head."""


#: Ids of tokens, as the tokenizer gives them.
_Ids = list[Annotated[int, Field(ge=0)]]


class TokensMixin(ConfigModel):
    """Single rows of embeddings, trained beside what the method does. The core has their mathematics."""

    trainable_token_indices: _Ids | dict[str, _Ids] | None = None
    """Ids of tokens whose rows of the input embedding are trained, of those tied to it as well; or a table: name (or suffix)
    of an embedding, or of another layer with a row for each token -> ids."""


class TiesMixin(ConfigModel):
    """Whether uses of one weight stay one when they are trained."""

    ensure_weight_tying: bool = False
    """Train the input embedding and what is tied to it as one: of each that is in `modules_to_save`, `target_modules` or
    `trainable_token_indices` all uses get the same copy, adapter or rows."""


def _not_empty(span: list[int]) -> list[int]:
    if span[0] >= span[1]:
        raise ValueError("the range is empty: it ends before its second number, which has to be larger than the first")
    return span


#: The first of some layers, and the one after the last.
_Span = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2), AfterValidator(_not_empty)]


class ReplicationMixin(ConfigModel):
    """A deeper model made of the layers of the base, some of which come several times and share their weights."""

    layer_replication: list[_Span] | None = None
    """Ranges of layers that the model is to have, one after the other, each without its end: `[[0, 4], [2, 5]]` makes layers
    0, 1, 2, 3, 2, 3, 4 of five. Replicas share weights and have adapters of their own."""


class LayersConfig(TargetsMixin, LayersMixin, ModulesToSaveMixin, PeftConfig):
    """What configs of methods on layers have, nearly all."""


class UpdateDropoutMixin(ConfigModel):
    """Parts of the update that are dropped in training; `peftc.ops.dropping` draws them."""

    rank_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping the update of an output feature in training."""
    module_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability of dropping the update of a whole layer in training."""


class OrientationMixin(ConfigModel):
    """How linear layers store their weight, which the compiler finds out."""

    fan_in_fan_out: bool = False
    """Whether the adapted layers store their weight as (in, out); set by itself where they do."""


class BiasMixin(ConfigModel):
    """Biases of the base that train along. A config says which words there are: `bias: Literal["none", "all", "x_only"] = "none"`
    for a method of the type X."""

    bias: str = "none"
    """Biases of the base model to train along: `none`, `all`, or those of adapted layers."""


class InitWeightsMixin(ConfigModel):
    """How a fresh adapter starts; the record's `identity_at_start` follows."""

    init_weights: bool = True
    """Start without effect; otherwise at random."""


class RankMixin(ConfigModel):
    """The rank of a low-rank update."""

    r: Count = 8
    """Rank of the update: larger learns more and costs more."""


class RankPatternMixin(RankMixin):
    """The same, with other ranks for some modules."""

    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some modules: pattern over the end of the path -> `r`."""

    #: `rank_pattern` overrides `r` for the modules that it matches
    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}


class AlphaMixin(RankPatternMixin):
    """A rank, and the numerator of the scaling `alpha / r`, with others for some modules."""

    alpha: int | float = 8
    """Numerator of the scaling `alpha / r`."""
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)
    """Other numerators for some modules: pattern over the end of the path -> `alpha`."""

    #: `alpha_pattern` overrides `alpha`, as `rank_pattern` does `r`
    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}
