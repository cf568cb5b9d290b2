"""Whether a method's `output` is linear, adds a constant, or is neither: tried once, on made-up vectors and with made-up numbers
in the method's slots, so that it does not depend on what these have come to.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor

from peftc.diagnostics import PeftcError
from peftc.runtime.slots.views import LayerView

#: Difference, in proportion to the numbers, beyond which two ways to compute the same are two things.
_TOLERANCE = 1e-3


class Form(StrEnum):
    """What a map of features is."""

    LINEAR = "linear"
    AFFINE = "affine"  # a linear map, and a constant
    NEITHER = "neither"


def form_of(output: Callable[[LayerView, Tensor], Tensor], view: LayerView) -> Form:
    """The form of `output` on a layer. Where it cannot be tried alone, as it reads a call, it is taken as declared: linear."""
    made_up = {
        name: _made_up(tensor.shape, 0.1, 0.7 + index) for index, (name, tensor) in enumerate(view.tensors().items())
    }
    size = view.layer.out_features
    first, second = _made_up((size,), 1.0, 0.3), _made_up((size,), 1.0, 1.9)
    rows = torch.stack([torch.zeros(size), first, second, first + second, 3 * first])
    try:
        with torch.no_grad():
            found = output(view.fixed(training=False).over(made_up), rows)
    except PeftcError:
        return Form.LINEAR
    constant, *maps = found.float().unbind()
    if not found.isfinite().all():
        return Form.LINEAR
    a, b, both, thrice = (value - constant for value in maps)
    bound = _TOLERANCE * max(1.0, float(found.abs().max()))
    if float((both - a - b).abs().max()) > bound or float((thrice - 3 * a).abs().max()) > bound:
        return Form.NEITHER
    return Form.AFFINE if float(constant.abs().max()) > bound / 10 else Form.LINEAR


def _made_up(shape: tuple[int, ...], scale: float, phase: float) -> Tensor:
    """Numbers without a pattern that a map would keep, the same every time."""
    count = 1
    for size in shape:
        count *= size
    return scale * (torch.arange(count, dtype=torch.float32, device="cpu") * 1.7 + phase).sin().add(0.2).view(shape)
