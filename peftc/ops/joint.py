"""Linear layers that read one input one after the other, such as q, k and v, as one function, for training.

Which layers do is not guessed but seen: the first to read an input computes for those too that read the same one after it the
last time. Each of them takes its output only if it was computed of all that it would compute it of, and else computes it itself.
So all of `A x` is one product, as are the gradients of all A, and the gradient of x is summed up in one place.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from peftc.ops.inputs import is_hooked, is_made_again, save_with_input, saved_with_input
from peftc.ops.linear import is_bare, is_unwatched, linear_low_rank, linear_output
from peftc.ops.lowrank import add_update, down, factor_gradients

#: How often outputs may be left lying before a layer computes for itself only.
_CHANCES = 3


class Layer(NamedTuple):
    """A frozen linear layer and its update: weight `(out, in)`, A `(r, in)`, B `(out, r)`."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float

    def state(self) -> tuple[object, ...]:
        """Equal for layers that compute the same of an input."""
        tensors = (self.weight, self.bias, self.A, self.B)
        return self.scale, *((id(tensor), None if tensor is None else tensor._version) for tensor in tensors)


class Seat:
    """A layer's place among those that read its input: which follow it, and what it computed with last."""

    __slots__ = ("__weakref__", "_base", "_chances", "_factors", "_followers", "_owner", "_scale")

    def __init__(self, base: nn.Module, owner: nn.Module) -> None:
        """`base` is called by `owner`, the adapted layer."""
        self._base, self._owner = base, owner
        self._chances = _CHANCES
        self._followers: list[ReferenceType[Seat]] = []
        self._factors: tuple[ReferenceType[Tensor], ReferenceType[Tensor]] | None = None
        self._scale = 0.0

    def saw(self, layer: Layer) -> None:
        """Computed with this."""
        self._factors, self._scale = (ref(layer.A), ref(layer.B)), layer.scale

    def precedes(self, other: Seat) -> None:
        """Another one read the input after this one."""
        if self._chances and other is not self and all(follower() is not other for follower in self._followers):
            self._followers.append(ref(other))

    def missed(self) -> None:
        """One that followed does no more."""
        self._chances -= 1
        self._followers.clear()

    def following(self, x: Tensor) -> dict[Seat, Layer]:
        """Those that will read the input too; none if one of them cannot be computed now, or is watched."""
        found = {}
        for follower in self._followers:
            seat = follower()
            layer = None if seat is None else seat._layer(x)
            if seat is None or layer is None:
                return {}
            found[seat] = layer
        return found

    def _layer(self, x: Tensor) -> Layer | None:
        if self._factors is None or not is_unwatched(self._owner) or not is_bare(self._base, x):
            return None
        A, B = self._factors[0](), self._factors[1]()
        weight, bias = self._base._parameters["weight"], self._base._parameters.get("bias")
        if A is None or B is None or weight is None:
            return None
        if any(t.device != x.device or t.dtype != x.dtype for t in (weight, A, B)):
            return None
        return Layer(weight, bias, A, B, self._scale)


class _Round:
    """Outputs that a layer computed for those that follow it, until they take them. They die with the input."""

    def __init__(self, leader: Seat, x: Tensor, outputs: dict[Seat, tuple[Layer, tuple[object, ...], Tensor]]) -> None:
        self._leader, self._outputs = ref(leader), outputs
        self._input: ReferenceType[Tensor] | None = ref(x, self.close)
        self._version = x._version

    def taken(self, seat: Seat, x: Tensor, layer: Layer) -> Tensor | None:
        """The layer's output, if it was computed of this."""
        if self._input is None or self._input() is not x or self._version != x._version or seat not in self._outputs:
            return None
        _, state, y = self._outputs[seat]
        if state != layer.state():
            return None
        del self._outputs[seat]
        if not self._outputs:
            self.close()
        return y

    def close(self, _: object = None) -> None:
        """Let go what is left; whoever computed it for nothing is told."""
        leader, self._input = self._leader(), None
        if self._outputs and leader is not None:
            leader.missed()
        self._outputs.clear()


class _Now(threading.local):
    """What this thread computes: the round that is open; which input was read last, in which version, and by whom first."""

    round: _Round | None = None
    first: tuple[ReferenceType[Tensor], int, ReferenceType[Seat]] | None = None


_now = _Now()


def joint_low_rank(seat: Seat, x: Tensor, layer: Layer) -> Tensor:
    """`x W^T + b + scale · x A^T B^T`, as `linear_low_rank`, or what was computed of that together with other layers.

    Only of an input that is made again for backward: then one backward for all layers is all that there can be, as it is for
    what made the input. Memory is freed when it would be without, and under hooks that pack what is kept, such as those of
    checkpoints, each layer is by itself.
    """
    if is_hooked():  # a checkpoint must find the same at its second run
        return linear_low_rank(x, *layer)
    if _now.round is not None:
        taken = _now.round.taken(seat, x, layer)
        if taken is not None:
            return taken
    if x.grad_fn is None or type(x) is not Tensor or not type(layer.A) is type(layer.B) is nn.Parameter:
        return linear_low_rank(x, *layer)
    _note(seat, x, layer)
    others = seat.following(x)
    if not others or not is_made_again(x):
        return linear_low_rank(x, *layer)
    if _now.round is not None:
        _now.round.close()
    y: Tensor
    weights, biases, As, Bs, scales = zip(layer, *others.values(), strict=True)
    y, *outputs = _JointLowRank.apply(x, weights, biases, scales, *As, *Bs)
    computed = zip(others.items(), outputs, strict=True)
    _now.round = _Round(seat, x, {other: (own, own.state(), output) for (other, own), output in computed})
    return y


def _note(seat: Seat, x: Tensor, layer: Layer) -> None:
    """That the layer reads the input now: first, or after another one."""
    seat.saw(layer)
    if _now.first is not None:
        read, version, first = _now.first
        leader = first()
        if read() is x and version == x._version and leader is not None:
            leader.precedes(seat)
            return
    _now.first = ref(x), x._version, ref(seat)


class _JointLowRank(torch.autograd.Function):
    """Outputs that nobody uses get no gradient, and neither do their factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        scales: Sequence[float],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(scales)
        firsts, seconds = factors[:count], factors[count:]
        h = down(x, torch.cat(firsts))
        ctx.scales, ctx.ranks = scales, [len(A) for A in firsts]
        ctx.set_materialize_grads(False)
        save_with_input(ctx, x, h, *weights, *factors)
        outputs = []
        for weight, bias, B, own, scale in zip(weights, biases, seconds, h.split(ctx.ranks), scales, strict=True):
            outputs.append(linear_output(x, weight, bias))
            add_update(outputs[-1], own, B, scale)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, *saved = saved_with_input(ctx)
        count = len(grads)
        weights, firsts, seconds = saved[:count], saved[count : 2 * count], saved[2 * count :]
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        grad_x: Tensor | None = None
        of_h: dict[int, Tensor] = {}
        of_A: list[Tensor | None] = [None] * count
        of_B: list[Tensor | None] = [None] * count
        for n, (grad, own) in enumerate(zip(grads, h.split(ctx.ranks), strict=True)):
            if grad is None:
                continue
            rows = grad.reshape(own.shape[1], grad.shape[-1])
            of_h[n], _, of_B[n] = factor_gradients(
                rows, x, firsts[n], seconds[n], own, ctx.scales[n], False, need[count + n]
            )
            if need_x:
                grad_x = torch.mm(rows, weights[n]) if grad_x is None else grad_x.addmm_(rows, weights[n])
        if not of_h:
            return (None,) * (4 + 2 * count)
        grad_h, A = torch.cat([*of_h.values()]), torch.cat([firsts[n] for n in of_h])
        if any(need[n] for n in of_h):
            found = torch.mm(grad_h, x.reshape(-1, x.shape[-1])).split([ctx.ranks[n] for n in of_h])
            for n, one in zip(of_h, found, strict=True):
                of_A[n] = one.clone() if need[n] else None  # gradients of layers share no memory
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_h.t(), A).view(x.shape)
        return grad_x, None, None, None, *of_A, *of_B
