"""How a base layer stores its weight and applies it; the only place that knows kinds of layer.

A backend shows parameters in logical order (weight `(out, in · kernel)`), writes them back, and says what `down` and `up`
of a thin update mean on its layer. Methods never see it, and it knows no method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftc.diagnostics import PeftcError
from peftc.runtime.bases.places import called_with, computed_elsewhere, tensors_of


class Backend(ABC):
    """One kind of base layer. Stateless."""

    #: dimension of the output, and of the input, that counts features; None when the input has none (ids)
    output_axis: int = -1
    input_axis: int | None = -1
    #: whether `input` on patches equals `input` on features, because there is no window
    patches_are_features: bool = True
    #: whether `y += B A x` may be fused: input and output are plain rows of features
    is_plain_linear: bool = False
    #: whether opening makes tensors that are not the layer's own: they are made for each use, and not kept
    opens_anew: bool = False
    #: whether the output of a call is nobody else's, and may be written to
    gives_fresh: bool = True
    #: whether the layer is `W x + b`; else its input and output are unknown, and only its parameters can be changed
    is_map: bool = True

    #: dimension of the logical weight along which its vectors lie (`MapTuner.vectors`); None where there are none
    vector_axis: int | None = None

    @abstractmethod
    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        """A stored parameter in logical order; a view where possible."""

    @abstractmethod
    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """The inverse, in the shape of `like`."""

    @abstractmethod
    def down(self, base: nn.Module, A: Tensor, x: Tensor) -> Tensor:
        """The first thin factor on the layer's input, with the layer's own geometry."""

    @abstractmethod
    def up(self, base: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        """The second thin factor."""

    def scaled(self, base: nn.Module, delta: Tensor) -> Tensor:
        """An update of the output by the parameters alone, as the layer would have it after its own arithmetic."""
        return delta

    def opened(self, base: nn.Module) -> dict[str, Tensor]:
        """The layer's own parameters by name, logical, from wherever they are."""
        return {n: self.to_logical(n, p.detach()) for n, p in tensors_of(base).items()}

    def opened_with(self, base: nn.Module, kept: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same, with what was set aside of the layer in place of what it has; None where it had nothing."""
        running = {name: tensor for name, tensor in self.opened(base).items() if name not in kept}
        return running | {n: self.to_logical(n, own.detach()) for n, own in kept.items() if own is not None}

    def replaced(self, base: nn.Module, changed: Mapping[str, Tensor], path: str) -> dict[str, Any]:
        """What is put into the layer for parameters that changed, by name. Raises `PeftcError` where they cannot be replaced."""
        made = {}
        for name, tensor in changed.items():
            if name not in base._parameters:
                raise PeftcError(computed_elsewhere(base, name, path))
            own = base._parameters[name]
            if own is None:
                made[name] = nn.Parameter(tensor.to(_dtype_of(base)), requires_grad=False)
                continue
            stored = self.to_stored(name, tensor, own).to(own.dtype)
            if stored.stride() != own.stride():  # files and kernels want weights as they lay in memory before
                stored = torch.empty_like(own, device=stored.device).copy_(stored)
            made[name] = nn.Parameter(stored, requires_grad=own.requires_grad)
        return made

    def run(self, base: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> Tensor:
        """The layer's own forward with other (logical) parameters in place, differentiable in them."""
        own = {n: p for n, p in base._parameters.items() if p is not None}
        strange = [*(n for n in own if n not in parameters), *(n for n in parameters if n not in base._parameters)]
        if strange:
            raise PeftcError(computed_elsewhere(base, strange[0]))
        stored = {
            n: self.to_stored(n, t, own[n]).to(own[n].dtype)
            if n in own
            else t.to(own["weight"].dtype)  # a bias it lacks
            for n, t in parameters.items()
        }
        with called_with(base, args, kwargs) as (args, kwargs):
            out: Tensor = functional_call(base, stored, args, kwargs)
        return out

    def can_refold(self, base: nn.Module, x: Tensor) -> bool:
        """Whether a call of the layer on `x` is no more than a product with its weight, which backward may then compute anew."""
        return False

    def exchanged(self, base: nn.Module, index: Tensor, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The output for input `x` with some vectors of the weight exchanged, `y` being the one without, which may be
        written to. The values are rounded as the weight is."""
        raise TypeError(f"a {type(base).__name__} has no vectors")

    def input_rows(self, weight: Tensor, base: nn.Module, patches: bool) -> Tensor:
        """The logical weight as rows over what `input` acts on: `(rows, features)`."""
        return weight

    def from_input_rows(self, rows: Tensor, weight: Tensor, base: nn.Module, patches: bool) -> Tensor:
        """The inverse of `input_rows`, in the shape of `weight`."""
        return rows


def _dtype_of(base: nn.Module) -> torch.dtype:
    """The dtype of a layer's weight."""
    weight = base._parameters["weight"]
    assert weight is not None
    return weight.dtype
