"""What the adapters of a layer act with, and what they act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peftc.registry.boundary import guarded
from peftc.runtime.bases.backend import Backend
from peftc.runtime.layer.affine import Form
from peftc.runtime.slots.views import LayerView
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot

#: x and whatever else the layer is called with -> y
Path = Callable[..., Tensor]

#: What each of a method's functions gives.
_GIVES: Mapping[str, type[object]] = {
    **dict.fromkeys(("branch", "input", "output"), Tensor),
    **dict.fromkeys(("thin", "rescaled", "vectors"), tuple),
    **dict.fromkeys(("params", "combine"), Mapping),
}


@dataclass(slots=True, eq=False)
class Part:
    """One adapter of a layer: its mathematics, its view, its dropout; and which parameter it is on, if on a single one.

    `modules` are the two that are called in place of products with the factors of a thin update, with its `scale`, where they
    are to be called.
    """

    tuner: MapTuner[Any]
    view: LayerView
    path: str
    dropout: Callable[[Tensor], Tensor] | None
    parameter: str = ""
    slots: Mapping[str, Slot] = field(default_factory=dict)
    modules: tuple[nn.Module, nn.Module] | None = None
    scale: float = 1.0
    known: dict[str, Form] = field(default_factory=dict)

    def fixed(self, training: bool) -> Part:
        """The same with this mode and the scaling of now. What is merged or combined must not depend on chance."""
        return self._as(self.view.fixed(training), self.dropout if training else None)

    def over(self, tensors: dict[str, Tensor]) -> Part:
        """The same with other tensors in its slots, by name."""
        return self._as(self.view.over(tensors), self.dropout)

    def _as(self, view: LayerView, dropout: Callable[[Tensor], Tensor] | None) -> Part:
        return Part(self.tuner, view, self.path, dropout, self.parameter, self.slots, known=self.known)

    def lowering(self, name: str) -> Callable[..., Any]:
        """One of the method's functions; what it raises names the plugin and the layer."""
        return guarded(getattr(self.tuner, name), str(self.view.config.peft_type), self.path, _GIVES[name])


@dataclass(frozen=True, slots=True)
class Under:
    """What a layer's adapters act on: `base`, which is called, and the base layer `inner` under all wrappers.

    Where they differ, other methods are between them: `between` gives their adapters in effect, first to last. `aside` are
    parameters of the base layer as they were before anything was merged into them.
    """

    base: nn.Module
    inner: nn.Module
    backend: Backend
    between: Callable[[], Sequence[Part]]
    aside: Callable[[], Mapping[str, Any]]
