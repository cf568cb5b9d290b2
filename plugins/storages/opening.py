"""What several storages do alike: count bytes, see a weight through its layer, and compute with one that is opened for each use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from peftc import plugin as p


def bytes_of(layer: p.nn.Module, names: Iterable[str] | None = None) -> int:
    """Bytes of a layer's tensors of these names, or of all but its bias."""
    own = {**layer._parameters, **layer._buffers}
    wanted = [name for name in own if name != "bias"] if names is None else names
    return sum(p.bytes_of(tensor) for name in wanted if (tensor := own.get(name)) is not None)


def by_identity(layer: Any, inputs: int, like: p.Tensor) -> p.Tensor:
    """The weight (out, in) of a layer that multiplies by it: what it makes of each input alone, less its bias."""
    import torch

    with torch.no_grad():
        rows = type(layer).forward(layer, torch.eye(inputs, dtype=like.dtype, device=like.device))
        columns: p.Tensor = rows if layer.bias is None else rows - layer.bias.to(rows.dtype)
    return columns.t()


def product(x: p.Tensor, opening: Callable[[], p.Tensor], bias: p.Tensor | None) -> p.Tensor:
    """`x W^T + b` with a weight (out, in) that is opened for the call, and again in backward, not kept from one to the other."""
    import torch
    from torch.nn.functional import linear

    weight = opening()
    if not torch.is_grad_enabled() or not x.requires_grad or torch.compiler.is_compiling():
        return linear(x, weight, bias)
    own = weight.untyped_storage().data_ptr()

    def keep(tensor: p.Tensor) -> Any:
        is_weight = tensor.untyped_storage().data_ptr() == own
        return (tensor.shape, tensor.stride(), tensor.storage_offset()) if is_weight else tensor

    def again(kept: Any) -> p.Tensor:
        return opening().as_strided(*kept) if isinstance(kept, tuple) else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, again):
        return linear(x, weight, bias)


def forward_by(function: Callable[..., p.Tensor], layer: Any) -> Mapping[str, Any]:
    """The setting that has a layer compute by a function `(layer, x)`; where hooks of accelerate stand before its own, behind them."""
    name = "_old_forward" if "_old_forward" in layer.__dict__ else "forward"
    return {name: partial(function, layer)}
