"""The mathematics of a method on one layer: what storage it needs, and how it changes the layer's map.

It never sees how the layer stores its weight, and the core never asks which method it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic
from peftc.graph.nodes import Kind, LayerFacts
from peftc.tuner.limits import RankLimit, grouped
from peftc.tuner.slots import Slot
from peftc.tuner.startable import Startable
from peftc.tuner.steps import Changes

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
    #: whether the mathematics only weighs what the method's other adapters on the layer would add (`a.siblings`): alone it has
    #: nothing to say, nothing can weigh it in turn, and the kit does not try it. Plans tell of it
    weighs_siblings: ClassVar[bool] = False
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
