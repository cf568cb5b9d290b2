"""What a variant of a method is: another mathematics over the method's options, which takes the place of its own where it is
chosen.

A method's record lists those that come with it, each chosen by an option of its own. Others bring theirs by the entry-point
group `peftc.variants` and the hook `peftc_variant`; a config names one of these by `variant`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from peftc import rules
from peftc.config.base import ConfigModel, PeftConfig, PeftConfigMixin
from peftc.config.mixins import VariantMixin
from peftc.diagnostics import ConfigError, Diagnostic
from peftc.graph.nodes import Kind, ModuleNode
from peftc.tuner.start import Start


class HasKinds(Protocol):
    """What is asked of mathematics here: the kinds of layer that it is for."""

    @property
    def supports(self) -> frozenset[Kind]: ...


T = TypeVar("T", bound=HasKinds, covariant=True)
Options = TypeVar("Options", bound=ConfigModel)


def of_node(given: T | tuple[T, ...] | Callable[[Any, ModuleNode], T], config: Any, node: ModuleNode) -> T:
    """The mathematics for a layer: the one there is, the first that supports the layer's kind, or what a function chooses."""
    if isinstance(given, tuple):
        return next((tuner for tuner in given if node.facts.kind in tuner.supports), given[0])
    return given(config, node) if callable(given) else given


def named_variant(config: PeftConfigMixin) -> str:
    """The variant that a config names; empty if it names none."""
    return (config.variant or "") if isinstance(config, VariantMixin) else ""


def variant_options(config: PeftConfig, model: type[Options]) -> Options:
    """What a config says in `variant_options`, as that model. Raises `ConfigError` for what does not fit it."""
    return model(**(config.variant_options if isinstance(config, VariantMixin) else {}))


def no_problems(config: Any) -> Iterable[Diagnostic]:
    """The default `check`."""
    return ()


@dataclass(frozen=True)
class Variant(Generic[T]):
    """A variant's record: all that the core knows of it."""

    #: the method that it is of
    peft_type: str
    #: its name; an entry point is called `<peft_type>.<name>`, in lower case
    name: str
    #: the mathematics; or several for different kinds of layer, of which the first that supports a layer's kind is taken; or
    #: a function that chooses one of `choices` by config and node
    tuner: T | tuple[T, ...] | Callable[[Any, ModuleNode], T]
    #: all that a function in `tuner` may choose
    choices: tuple[T, ...] = field(default=(), kw_only=True)
    #: when it acts; left out, where the config names it as its `variant`
    chosen: Callable[[Any], bool] | None = None
    #: the option that chooses it, for diagnostics
    option: str = "variant"
    #: the model of `variant_options`, for variants that are chosen by name
    options: type[ConfigModel] | None = None
    #: what its adapters do to base weights (`Start.changes_base`): part of what an adapter is, whatever it begins with. The
    #: factors begin as the mathematics says; no other start can be named beside it
    start: Start | None = None
    #: problems of the options, where it acts, that need no model
    check: Callable[[Any], Iterable[Diagnostic]] = no_problems
    #: slots of its own that hold trainable tensors; their names begin with the method's prefix
    layer_names: tuple[str, ...] = ()
    #: what it does, in one sentence
    summary: str = ""
    #: where it was published
    paper: str = ""
    #: configs that the conformance kit uses
    examples: tuple[Mapping[str, Any], ...] = ()
    #: options that choose it, where no example does
    chosen_by: Mapping[str, Any] = field(default_factory=dict)

    def acts(self, config: PeftConfig) -> bool:
        """Whether a config chooses it."""
        return named_variant(config) == self.name if self.chosen is None else bool(self.chosen(config))

    @property
    def tuners(self) -> tuple[T, ...]:
        """All its mathematics."""
        own = self.tuner if isinstance(self.tuner, tuple) else () if callable(self.tuner) else (self.tuner,)
        return (*own, *self.choices)

    @property
    def supports(self) -> frozenset[Kind]:
        """Kinds of layer that it can adapt."""
        return frozenset(kind for tuner in self.tuners for kind in tuner.supports)

    def problems(self, config: PeftConfig) -> Iterator[Diagnostic]:
        """What is wrong with the options where it acts."""
        if self.options is not None:
            try:
                variant_options(config, self.options)
            except ConfigError as error:
                for told in error.diagnostics:
                    yield rules.BAD_VALUE(f"In `variant_options`: {told.what}", fix=told.fix, where="variant_options")
                return
        yield from self.check(config)


def several(acting: Iterable[Variant[Any]]) -> Iterator[Diagnostic]:
    """The problem of a config that chooses more than one variant."""
    chosen = list(acting)
    if len(chosen) > 1:
        options = " and ".join(f"`{variant.option}`" for variant in chosen)
        what = f"{options} choose {len(chosen)} variants, of which only one can act"
        yield rules.CONTRADICTION(what, fix="Choose one of them.", where=chosen[1].option)
