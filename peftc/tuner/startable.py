"""What mathematics with thin factors says so that starts (`peftc.tuner.start`) can fill them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

from peftc.config.base import PeftConfig
from peftc.graph.nodes import LayerFacts
from peftc.tuner.slots import Slot, labelled

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.tuner.views import SlotInit

C = TypeVar("C", bound=PeftConfig)


class Startable(Generic[C]):
    """The part of a method's mathematics that is about starts."""

    def slots(self, c: C, layer: LayerFacts) -> Iterable[Slot]:
        """See `MapTuner`."""
        raise NotImplementedError

    def init(self, c: C, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        """See `MapTuner`."""
        raise NotImplementedError

    def thin_slots(self, c: C, layer: LayerFacts) -> tuple[str, str]:
        """Labels of the slots that hold the factors A and B, for methods with `of_thin`: by default the first two."""
        first, second, *_ = labelled(self.slots(c, layer))
        return first, second

    def before_start(self, c: C, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        """What is drawn before a start (`peftc.tuner.start`) fills the factors: by default all that `init` does."""
        self.init(c, layer, slots, init)

    def of_twice(self, c: C) -> C | None:
        """The options of an adapter with twice the rank on every layer and the same scaling, which begins as usual: it can hold
        what this one came to beside what it began with. None if there are none."""
        return None

    def of_thin(self, c: C, layer: LayerFacts, A: Tensor, B: Tensor) -> Mapping[str, Tensor]:
        """The inverse of `thin` at a scaling of 1: slots, by label, from A `(r, in · kernel)` and B `(out, r)`. Methods that have
        such factors and no `thin`, as their update is not the product, may give it for starts."""
        raise NotImplementedError

    @property
    def is_startable(self) -> bool:
        """Whether a start can fill its slots."""
        return type(self).of_thin is not Startable.of_thin
