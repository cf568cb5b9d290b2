"""Copies that are trained in float32 beside a base in half precision, as slots are: in a call they take and give what the
module itself would, merged or saved they have its number format again.

Whether a copy is lifted is seen by its tensors beside those of the module: either may be cast at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftc.runtime.journal import keep_memory

HALF = frozenset({torch.float16, torch.bfloat16})
#: Torch's own modules that compute in the format of their weights, and take none wider.
_STRICT = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)


def lift(tensor: Tensor) -> None:
    """Let a tensor of a copy be in float32, if it is in half precision."""
    if tensor.dtype in HALF:
        tensor.data = tensor.data.float()


def narrow(twin: nn.Module, original: nn.Module) -> nn.Module:
    """The copy, in the module's number formats from now on: it takes the module's place."""
    for tensor, format_ in _pairs(twin, original):
        if tensor.dtype is torch.float32 and format_ in HALF:
            keep_memory(tensor)
            tensor.data = tensor.data.to(format_)
    return twin


def narrowed(original: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor that is called so in a copy, in the number format that it has in the module."""
    format_ = _format_of(original, name)
    return tensor.to(format_) if tensor.dtype is torch.float32 and format_ in HALF else tensor


def half_of(twin: nn.Module, original: nn.Module) -> torch.dtype | None:
    """The half precision of the module, of which the copy is in float32; None if it is not lifted."""
    for tensor, format_ in _pairs(twin, original):
        if tensor.dtype is torch.float32 and format_ in HALF:
            return format_
    return None


def called(twin: nn.Module, half: torch.dtype, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A lifted copy's output for what the module would be called with, in the format that the module's would have.

    That is the inputs' where they are in half precision. Without numbers to compute with (indices) it is the weights', and
    where they are in float32 already that which the module computes in.
    """
    formats: list[torch.dtype] = []

    def widened(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            formats.append(tensor.dtype)
        return tensor.float() if tensor.dtype in HALF else tensor

    output = twin(*_each(tuple(args), widened), **{name: _each(value, widened) for name, value in kwargs.items()})
    own = next((format_ for format_ in formats if format_ in HALF), None)
    if own is None and formats and not isinstance(twin, _STRICT):
        return output  # a module that takes float32 beside weights in half precision gives it too
    given = own or half
    return _each(output, lambda tensor: tensor.to(given) if tensor.dtype is torch.float32 else tensor)


def _each(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """A value with other tensors in it; what is none, and holds none in tuples, lists or mappings, is the same object."""
    if isinstance(value, Tensor):
        return of(value)
    if isinstance(value, (tuple, list)):
        made = [_each(item, of) for item in value]
        if all(one is other for one, other in zip(made, value, strict=True)):
            return value
        return getattr(type(value), "_make", type(value))(made)  # tuples with names are made so
    if isinstance(value, dict):  # such as an output of transformers, a mapping with attributes
        pairs = {key: _each(item, of) for key, item in value.items()}
        if all(pairs[key] is value[key] for key in pairs):
            return value
        return pairs if type(value) is dict else type(value)(**pairs)
    return value


def _pairs(twin: nn.Module, original: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Tensors of the copy, each with the format that it has in the module."""
    ours, theirs = ([*module.parameters(), *module.buffers()] for module in (twin, original))
    return [(own, tensor.dtype) for own, tensor in zip(ours, theirs, strict=False)]


def _format_of(module: nn.Module, name: str) -> torch.dtype | None:
    path, _, tail = name.rpartition(".")
    owner = module.get_submodule(path)
    tensor = owner._parameters.get(tail) if tail in owner._parameters else owner._buffers.get(tail)
    return None if tensor is None else tensor.dtype
