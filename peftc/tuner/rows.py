"""Rows of an embedding that train: chosen vectors take the place of the layer's own and start as copies of them.

A method may be this alone, or have it beside its own mathematics (`peftc.config.mixins.TokensMixin`). No copy of the whole
matrix is ever made in a call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic
from peftc.graph.nodes import LINEAR_KINDS, Kind, LayerFacts
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot, derived_slot, parameter_slot

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.tuner.views import SlotInit, View

C = TypeVar("C", bound=PeftConfig)

#: The option that has a method train rows beside what it does.
ROWS_OPTION = "trainable_token_indices"
#: What the rows' tensors are called: after the option, as in the reference.
_STEM = ROWS_OPTION.removesuffix("_indices") + "s"
DELTA, INDICES = f"{_STEM}_delta", f"{_STEM}_indices"
#: The module in a wrapper that has the rows which train beside a method.
ROWS_MODULE = "token_adapter"


class RowsTuner(MapTuner[C]):
    """`y = W'[x]` of an embedding, or `y = W' x + b` of a layer with one row per token; `W'` is W with rows exchanged."""

    supports = LINEAR_KINDS | {Kind.EMBEDDING}
    #: the option that has the indices
    rows_option: ClassVar[str]
    #: which layers have the rows together, as of slots
    rows_share: ClassVar[str] = ""

    @abstractmethod
    def rows(self, c: C) -> Sequence[int]:
        """Indices of the rows that train."""

    def starts_as_base(self, c: C) -> bool:
        """Whether they start as the layer's own, which changes nothing; otherwise at random."""
        return True

    def slots(self, c: C, layer: LayerFacts) -> Iterable[Slot]:
        """The rows `(n, size)`, and their indices."""
        count = len(self.rows(c))
        size = layer.out_features if layer.kind is Kind.EMBEDDING else layer.in_features
        yield parameter_slot(DELTA, (count, size), share=self.rows_share)
        yield derived_slot(INDICES, (count,), dtype="int64", share=self.rows_share)

    def init(self, c: C, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        """Copies of the layer's rows."""
        if not self.starts_as_base(c):
            init.normal(slots[DELTA])
            return
        weight = init.base["weight"]
        rows = weight.t() if layer.kind is Kind.EMBEDDING else weight
        slots[DELTA].copy_(rows[list(self.rows(c))])

    def derive(self, c: C, layer: LayerFacts, slots: Mapping[str, Slot]) -> Mapping[str, Tensor]:
        """The indices as a tensor."""
        from peftc.ops import plain

        return {INDICES: plain.indices(self.rows(c))}

    def check(self, c: C, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        """Indices beyond the layer."""
        rows = layer.in_features if layer.kind is Kind.EMBEDDING else layer.out_features
        beyond = [i for i in self.rows(c) if i >= rows]
        if beyond:
            what = f"`{path}` has {rows:,} rows, but `{self.rows_option}` names {', '.join(map(str, beyond[:3]))}"
            fix = "Add the tokens to the model first (`model.resize_token_embeddings`), or correct the ids."
            yield rules.BAD_TARGET(what, fix=fix, where=path)

    def clash(self, c: C, other: C) -> str:
        """Rows that both adapters have."""
        both = sorted({*self.rows(c)} & {*self.rows(other)})
        return f"both train the token {both[0]}" if both else ""

    def vectors(self, a: View[C]) -> tuple[Tensor, Tensor]:
        """The indices, and the rows that stand there."""
        return a[INDICES], a[DELTA]


class RowsBeside(RowsTuner[Any]):
    """Rows that train beside a method's own mathematics. The options in force at a layer have its own indices."""

    rows_option = ROWS_OPTION

    def rows(self, c: Any) -> Sequence[int]:
        found: Sequence[int] = getattr(c, ROWS_OPTION)
        return found


#: The one object of it.
ROWS_BESIDE = RowsBeside()


def wrong_rows(indices: Sequence[int], option: str) -> Iterator[str]:
    """What is wrong with indices whatever the layer is, as sentences: those that no row can have, and those given twice.

    >>> list(wrong_rows([3, -1, 3], "ids"))
    ['`ids` names 3 twice', '`ids` names -1, which no token can be']
    """
    twice = [str(i) for i, count in Counter(indices).items() if count > 1]
    below = [str(i) for i in indices if i < 0]
    if twice:
        yield f"`{option}` names {', '.join(twice[:3])} twice"
    if below:
        yield f"`{option}` names {', '.join(below[:3])}, which no token can be"
