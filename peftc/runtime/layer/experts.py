"""How the weights of a stack of experts change where a method's mathematics is that of one linear layer: all at once, by
mapping its own fold over the leading dimension of weights and slots; one by one where torch cannot map it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vmap

from peftc.ops.transposed import hides_saved
from peftc.runtime.slots.views import LayerView
from peftc.tuner.experts import PerExpert

Parameters = Mapping[str, Tensor]


def over_experts(
    tuner: PerExpert,
    view: LayerView,
    fold: Callable[[LayerView, Parameters, Parameters], Parameters],
    p: Parameters,
    p0: Parameters,
) -> Tensor:
    """`(experts, out, in)`: the running weights `p` of all experts as `fold` changes one, beside the pristine `p0`. What it
    draws at random differs from expert to expert."""
    stacked, tensors = tuner.stacked(view.config, view.layer), view.tensors()

    def of_one(own: dict[str, Tensor], weight: Tensor, pristine: Tensor) -> Tensor:
        return fold(view.of_expert({**tensors, **own}), {"weight": weight}, {"weight": pristine})["weight"]

    own = {label: tensor for label, tensor in tensors.items() if label in stacked}
    if hides_saved() and not tuner.one.lowerings & {
        "params",
        "thin",
    }:  # by vector-Jacobian products, for which see there
        each = range(p["weight"].shape[0])
        return torch.stack([of_one({k: t[i] for k, t in own.items()}, p["weight"][i], p0["weight"][i]) for i in each])
    changed: Tensor = vmap(of_one, randomness="different")(own, p["weight"], p0["weight"])
    return changed
