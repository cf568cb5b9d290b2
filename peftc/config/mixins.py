"""Options that many methods share. A config takes the mixins it needs; each has its pass in the compiler.

Meaning and defaults are the reference's; the compiler asks `isinstance(config, Mixin)` and never for a method.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from peftc.config.base import ConfigModel


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


class TargetNamesMixin(ConfigModel):
    """Which modules are adapted."""

    target_modules: Names = None
    """Names (a module matches by its full path or by a suffix at a dot), one regular expression over the full path, or
    `all-linear`. Left out: the default for the model's type, or by role: attention's query and value for most methods."""


class TargetsMixin(TargetNamesMixin):
    """Which modules are adapted, and which of those are not."""

    exclude_modules: Names = None
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


class UpdateDropoutMixin(ConfigModel):
    """Parts of the update that are dropped in training; `peftc.ops.dropping` draws them."""

    rank_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping the update of an output feature in training."""
    module_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability of dropping the update of a whole layer in training."""


class RankMixin(ConfigModel):
    """The rank of a low-rank update."""

    r: int = Field(default=8, ge=1)
    """Rank of the update: larger learns more and costs more."""
