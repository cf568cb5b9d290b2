"""A layer's input, kept for backward as what autograd keeps of it anyway.

The gradient of a factor that reads the input needs it once more. Where an element-wise operation or a norm made it of tensors
that its own backward keeps, those are kept, and the input is made again: so adapters keep little beside a frozen base.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import SavedTensor, _top_saved_tensors_default_hooks

from peftc.registry.boundary import is_out_of_memory

#: makes a tensor of others, which it takes from an iterator
Make = Callable[[Iterator[Tensor]], Tensor]
#: how, and of what, in the order in which it is taken
Making = tuple[Make, list[Tensor]]

#: From how many steps back an input is made again: a norm in half precision takes four.
_DEPTH = 5
#: Whether torch tells how a kept tensor is packed: what a hook has packed may be unpacked once only (2.6).
_TELLS = "unpack_hook" in vars(SavedTensor)


def save_with_input(ctx: Any, x: Tensor, *others: Tensor | None) -> None:
    """In a function's forward: have backward find its input, in whatever way costs least, and others. Instead of
    `ctx.save_for_backward`."""
    kept, parts = _kept(x)
    ctx.kept_input = kept
    ctx.save_for_backward(*parts, *others)


def saved_with_input(ctx: Any) -> tuple[Any, ...]:
    """In its backward: the input, and the others."""
    kept: _Kept = ctx.kept_input
    saved = ctx.saved_tensors
    return kept.again(saved[: kept.count]), *saved[kept.count :]


class _Kept:
    """An input that several layers may have read, one after the other, as their backwards find it."""

    __slots__ = ("__weakref__", "_input", "_left", "_made", "_make", "_version", "count", "uses")

    def __init__(self, x: Tensor, make: Make, count: int) -> None:
        self._input, self._version = ref(x), x._version
        self._make = make
        #: how many tensors stand for it, and how many layers read it
        self.count, self.uses = count, 0
        self._left = 0
        self._made: Tensor | None = None

    def is_of(self, x: Tensor) -> bool:
        return self._input() is x and self._version == x._version

    def again(self, parts: Sequence[Tensor]) -> Tensor:
        """The input. It is made once for all layers that read it, whose backwards follow each other."""
        if torch.is_grad_enabled():  # gradients will be differentiated, perhaps by the input itself, if anybody has it
            own = self._input()
            return own if own is not None and own._version == self._version else self._make(iter(parts))
        made = self._made
        if made is None:
            made, self._left = self._make(iter(parts)), self.uses
        self._left -= 1
        self._made = made if self._left > 0 else None
        return made


class _Last(threading.local):
    """The input that was kept last: layers that share one are called one after the other."""

    kept: Callable[[], _Kept | None] = staticmethod(lambda: None)


_last = _Last()


def _kept(x: Tensor) -> tuple[_Kept, list[Tensor]]:
    made = _making(x)
    if made is None:
        return _Kept(x, next, 1), [x]
    make, parts = made
    kept = _last.kept()
    if kept is None or not kept.is_of(x):
        kept = _Kept(x, make, len(parts))
        _last.kept = ref(kept)
    kept.uses += 1
    return kept, parts


def _making(x: Tensor) -> Making | None:
    """How to make a tensor again; None where it has to be kept. With hooks around it is kept, and they pack it; what somebody
    wrote into, perhaps without a history, is kept as it is."""
    node = x.grad_fn
    if node is None or node.name() not in _BY or x._version:
        return None
    if not _TELLS or _top_saved_tensors_default_hooks(False) is not None:
        return None
    try:
        return _BY[node.name()](node, _DEPTH)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None  # something was written into since: backward will say so, if it gets there


# by operation ---------------------------------------------------------------------------------------------------------


def _saved(node: Any, name: str) -> Making | None:
    """A tensor that the operation keeps; None if it does not, or a hook packed it."""
    if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
        return None
    tensor = getattr(node, f"_saved_{name}")
    return None if tensor is None else (next, [tensor])


def _argument(node: Any, place: int, depth: int) -> Making | None:
    """An argument of the operation that it does not keep, made again in its turn."""
    before, output = node.next_functions[place]
    if before is None or output != 0 or depth == 0:
        return None
    found = _BY.get(before.name())
    return None if found is None else found(before, depth - 1)


def _product(node: Any, depth: int) -> Making | None:
    first = _saved(node, "self") or _argument(node, 0, depth)
    second = _saved(node, "other") or _argument(node, 1, depth) if first is not None else None
    if first is None or second is None:
        return None
    (one, parts), (other, more) = first, second
    return lambda tensors: one(tensors) * other(tensors), [*parts, *more]


def _then(change: Callable[[Tensor], Tensor], made: Making | None) -> Making | None:
    if made is None:
        return None
    make, parts = made
    return lambda tensors: change(make(tensors)), parts


def _copy(node: Any, depth: int) -> Making | None:
    (made,) = node._input_metadata  # of what the operation gave
    return _then(lambda t: t.to(made.device, made.dtype), _argument(node, 0, depth))


def _view(node: Any, depth: int) -> Making | None:
    (made,) = node._input_metadata
    shape = tuple(made.shape)
    return _then(lambda t: t.reshape(shape), _argument(node, 0, depth))


def _gelu(node: Any, depth: int) -> Making | None:
    return _then(partial(F.gelu, approximate=node._saved_approximate), _saved(node, "self"))


def _silu(node: Any, depth: int) -> Making | None:
    return _then(F.silu, _saved(node, "self"))


def _layer_norm(node: Any, depth: int) -> Making | None:
    """By the mean and the deviation that it keeps; not those that are rounded to half precision."""
    found = [_saved(node, name) for name in ("input", "result1", "result2", "weight", "bias")]
    needed, affine = found[:3], [made for made in found[3:] if made is not None]
    if any(made is None for made in needed) or len(affine) == 1:
        return None
    parts = [tensor for made in (*needed, *affine) if made is not None for tensor in made[1]]
    if parts[2].dtype.itemsize < 4:
        return None
    dims, (gave,) = [-1 - n for n in range(len(node._saved_normalized_shape))], node._input_metadata

    def make(tensors: Iterator[Tensor]) -> Tensor:
        x, mean, inverse = next(tensors), next(tensors), next(tensors)
        if torch.is_grad_enabled():  # with their history
            var, mean = torch.var_mean(x.to(inverse.dtype), dims, correction=0, keepdim=True)
            inverse = (var + (inverse.pow(-2) - var).detach()).rsqrt()
        x = (x - mean) * inverse
        return (torch.addcmul(next(tensors), x, next(tensors)) if affine else x).to(gave.dtype)

    if affine:
        parts[3:] = parts[:2:-1]  # the bias comes first
    return make, parts


_BY: dict[str, Callable[[Any, int], Making | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _copy,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "NativeLayerNormBackward0": _layer_norm,
}
