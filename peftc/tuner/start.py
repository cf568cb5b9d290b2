"""What a start is: how the thin factors of a fresh adapter begin, and with them perhaps the base weight.

A start belongs to no method. A method says which of its options names one (`TunerMethod.start_option`), the tuner puts the
factors into its slots (`MapTuner.of_thin`), and the core does the rest: data, base weights, files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from peftc import rules
from peftc.config.base import ConfigModel, PeftConfig
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import LINEAR_KINDS, Kind, LayerFacts

if TYPE_CHECKING:
    from torch import Tensor, nn


class Reads(StrEnum):
    """What a start reads of the model before it can begin."""

    #: the weight alone, if that
    NOTHING = ""
    #: what layers are called with
    INPUTS = "inputs of layers"
    #: what a loss says of weights
    GRADIENTS = "gradients of weights"


@dataclass(frozen=True, slots=True)
class Begun:
    """What a start gives for one layer."""

    #: the first factor `(r, in · kernel)`; None leaves it as the method drew it
    A: Tensor | None
    #: the second factor `(out, r)`, likewise
    B: Tensor | None
    #: tensors by name, for starts that keep others than these (`Start.kept`)
    kept: Mapping[str, Tensor] = field(default_factory=dict)


class StartView(Protocol):
    """One layer, as a start sees it."""

    @property
    def config(self) -> PeftConfig:
        """The options of the adapter in force on this layer."""

    @property
    def argument(self) -> str:
        """What follows the start's name in the option: `niter_4` of `pissa_niter_4`; empty if nothing does."""

    @property
    def layer(self) -> LayerFacts:
        """Facts of the base layer."""

    @property
    def rank(self) -> int:
        """Rows of A."""

    @property
    def scaling(self) -> float:
        """The factor `s` of the update `s · B A`."""

    @property
    def weight(self) -> Tensor:
        """The base weight before any adapter, `(out, in · kernel)`, in float32 or wider. Not to be written to."""

    @property
    def data(self) -> Mapping[str, Tensor]:
        """What was gathered for this layer beforehand (`peftc.plugin.gathered`); empty if nothing was."""

    def normal(self, *shape: int) -> Tensor:
        """Normal random numbers: those of torch's global generator on the CPU, brought to where the weight is."""

    def permutation(self, count: int) -> Tensor:
        """The numbers below `count` in random order, from the same generator."""


class Start(ABC):
    """How thin factors begin. Stateless; one object serves all layers. Give `name` and `factors`."""

    #: the value of the option; `name_more` gives it the argument `more`
    name: ClassVar[str]
    #: what it does, in a sentence for lists
    summary: ClassVar[str] = ""
    #: where it was published
    paper: ClassVar[str] = ""
    #: kinds of layer that it is defined on
    kinds: ClassVar[frozenset[Kind]] = LINEAR_KINDS
    #: whether layers of other kinds begin as without it, with a warning; else they are refused
    spares_others: ClassVar[bool] = False
    #: whether the base weight changes with it; only for methods whose update is the product of the factors (`thin`)
    changes_base: ClassVar[bool] = False
    #: names of the tensors that the change of the base weight follows from; they are saved beside the adapter
    kept: ClassVar[tuple[str, ...]] = ("A", "B")
    #: whether the change is `-s · B A` of these two, so that adapters can be converted to others beside the original base
    is_offset: ClassVar[bool] = True
    #: whether of the changes of several adapters one holds the others, that of the largest rank; else all of them add up
    nests: ClassVar[bool] = False
    #: what it reads of the model beforehand
    reads: ClassVar[Reads] = Reads.NOTHING
    #: whether it can begin without that, to be filled later
    can_wait: ClassVar[bool] = False
    #: the helper function that gathers it, for who is told that it is lacking
    helper: ClassVar[str] = ""
    #: the factor that does not train: `"A"` or `"B"`, or none
    frozen: ClassVar[str] = ""
    #: whether the rank may be no larger than the layer's own
    within_rank: ClassVar[bool] = False
    #: the option that has its nested options, where the method has it
    options: ClassVar[str] = ""
    #: the model of these, where the method's option is a plain mapping
    how: ClassVar[type[ConfigModel] | None] = None
    #: options without which it cannot be chosen, as the conformance kit gives them
    needs: ClassVar[Mapping[str, Any]] = {}
    #: arguments with which the kit tries it
    arguments: ClassVar[tuple[str, ...]] = ("",)

    @abstractmethod
    def factors(self, s: StartView) -> Begun:
        """The factors of a layer, and what the change of its weight follows from."""

    def changed(self, s: StartView, kept: Mapping[str, Tensor]) -> Tensor:
        """The base weight while the adapter acts, `(out, in · kernel)`: by default `W - s · B A`, of the factors that were
        kept."""
        weight = s.weight
        return weight - s.scaling * kept["B"].to(weight) @ kept["A"].to(weight)

    def prepare(self, model: nn.Module, c: Any, batches: Sequence[Mapping[str, Tensor]]) -> Any:
        """Gather what it reads from a base model on batches of training data, each the keywords of a call; returns the options
        to begin with. `peftc train` calls it for starts that read data."""
        what = f"The start `{self.name}` does not say how it takes data from a training"
        raise PeftcError(rules.START_DATA(what, fix="Gather it in a script of your own."))

    def repeats(self, argument: str) -> bool:
        """Whether the same change of the base weight is computed again, without data and chance."""
        return self.reads is Reads.NOTHING

    def check(self, c: Any, argument: str) -> Iterable[Diagnostic]:
        """Problems of the options that need no layer."""
        return ()

    def check_layer(self, c: Any, layer: LayerFacts, rank: int, path: str) -> Iterable[Diagnostic]:
        """Problems on a layer that no declaration of the class says."""
        return ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """A start with its argument, as an option names it."""

    start: Start
    argument: str
    #: the option that chooses the variant which it belongs to (`Variant.start`); empty where an option names it
    along: str = ""

    @property
    def value(self) -> str:
        """The option's value."""
        return f"{self.start.name}_{self.argument}" if self.argument else self.start.name

    def said(self, option: str) -> str:
        """How the options say it, for diagnostics; `option` is the one that may name a start."""
        return f"`{self.along}`" if self.along else f"`{option}: {self.value}`"

    def otherwise(self, option: str) -> str:
        """What to do without it, at the end of a sentence."""
        return f"remove `{self.along}`" if self.along else f"choose another `{option}`"

    def acts_on(self, layer: LayerFacts) -> bool:
        """Whether layers of this kind begin by it."""
        return layer.kind in self.start.kinds

    def problems(self, c: PeftConfig, layer: LayerFacts, rank: int, path: str, option: str) -> Iterator[Diagnostic]:
        """What is wrong with it on a layer, as it declares; then what it finds itself."""
        start = self.start
        if not self.acts_on(layer):
            able = ", ".join(sorted(kind.value for kind in start.kinds))
            what = f"{self.said(option)} is not defined on `{path}` ({layer.kind.value}): it is on {able}"
            if start.spares_others:
                fix = "Leave such layers out, if that is not meant."
                yield rules.START_SPARED(f"{what}; the layer begins as without it", fix=fix, where=path)
            else:
                fix = f"Leave such layers out (`exclude_modules`), or {self.otherwise(option)}."
                yield rules.START_UNFIT(what, fix=fix, where=path)
            return
        if start.within_rank and rank > layer.rank:
            what = f"The rank {rank} is beyond what `{path}` can have ({layer.rank}), and `{self.value}` takes as many components"
            yield rules.START_UNFIT(what, fix=f"Set the rank to at most {layer.rank} there.", where=path)
        stored = layer.packed or layer.weight
        dtype = stored.dtype if stored is not None else ""
        if (start.changes_base or start.within_rank) and dtype not in _REAL:
            what = f"`{self.value}` decomposes the weight of `{path}`, which is {dtype or 'not there'}"
            yield rules.START_UNFIT(what, fix="Load the base model unquantised.", where=path)
        yield from start.check_layer(c, layer, rank, path)


_REAL = frozenset({"float16", "bfloat16", "float32", "float64"})
