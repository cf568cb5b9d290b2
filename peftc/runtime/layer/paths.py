"""What a layer's forward does, composed when adapters are activated and not per call.

Active adapters fold over the base map in activation order, each by the cheapest lowering that its method gives and the
layer's kind admits. If one of them can only change parameters, all do, and the base runs once with the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftc.host.torch_modules import GLOBAL_HOOKS, own_hooks
from peftc.ops.folded import linear_folded
from peftc.ops.linear import is_bare, is_unwatched, linear_low_rank
from peftc.ops.lowrank import Noise, add_low_rank, is_traced
from peftc.ops.recomputed import can_recompute, recomputed
from peftc.ops.rescaled import linear_rescaled
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.layer.folding import adapted, folded, form_of_output, opened, refuse_waiting, trained_of
from peftc.runtime.layer.parts import Part, Path, Under
from peftc.runtime.slots.views import LayerView
from peftc.tuner.maps import MapTuner


def compose(under: Under, parts: Sequence[Part]) -> Path:
    """The layer's forward with these adapters in effect, first to last."""
    if not parts:
        return under.base
    if not all(has_functional_form(part.tuner, under.backend) for part in parts):
        return _through_parameters(under, parts)
    path: Path = under.base
    for part in parts:
        path = _step(path, under, part, alone=len(parts) == 1)
    if under.base is under.inner and all(_is_dense(part) for part in parts):
        return _where_precise(under, _through_parameters(under, parts), path)
    return path


def _is_dense(part: Part) -> bool:
    """Whether changed parameters cost less than the update beside the layer, and do the same."""
    return part.tuner.branch_is_dense and "params" in part.tuner.lowerings and part.dropout is None


def _where_precise(under: Under, through: Path, beside: Path) -> Path:
    """Changed parameters where the base weight has at least single precision now, updates beside the base elsewhere."""
    parameters = under.inner._parameters

    def run(*args: Any, **kwargs: Any) -> Tensor:
        weight = parameters.get("weight")
        precise = weight is not None and weight.is_floating_point() and weight.dtype.itemsize >= 4
        return (through if precise else beside)(*args, **kwargs)

    return run


def has_functional_form(tuner: MapTuner[Any], backend: Backend) -> bool:
    """Whether the method can act beside the base layer, rather than only through its parameters."""
    if not backend.is_map:
        return False
    given = tuner.lowerings
    if given & {"thin", "rescaled", "branch"}:
        return True
    if "vectors" in given:
        return backend.vector_axis is not None
    if "input" in given:
        patches = tuner.input_space == "patches" and not backend.patches_are_features
        if backend.input_axis is None or patches:
            return False
    return "input" in given or "output" in given


def _step(path: Path, under: Under, part: Part, alone: bool) -> Path:
    given = part.tuner.lowerings
    if "thin" in given:
        fresh = under.base is under.inner  # else another method made the output, and may need it
        if fresh and under.backend.is_plain_linear and part.modules is None:
            return _fused(path, under, part, alone)
        return _thin(path, under, part)
    if "rescaled" in given and alone and under.base is under.inner and under.backend.is_plain_linear:
        return _rescaled(path, under, part)
    if given & {"rescaled", "branch"}:
        return _branch(path, under, part)
    if "vectors" in given:
        return _vectors(path, under, part)
    if "input" in given:
        path = _input(path, change_of_input(under, part))
    return _output(path, change_of_output(under, part)) if "output" in given else path


def _fused(path: Path, under: Under, part: Part, alone: bool) -> Path:
    """Base and update as one function in training, where the base allows it and nothing is to be added to what that returns;
    else the update goes into the base's fresh output.

    A hook of the base may have kept that output, or made a view of it: then it goes into a copy.
    """
    thin, view, dropout = part.lowering("thin"), part.view, part.dropout
    base, packed = under.base, under.backend.opens_anew
    forward, backward, backward_pre = own_hooks(base)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # the base first, which may draw random numbers, then dropout, then the method: as the reference does
        linear = (
            base if alone and type(base) is nn.Linear and torch.is_grad_enabled() and not args and not kwargs else None
        )
        bare = linear is not None and is_bare(linear, x)
        y = None if bare else path(x, *args, **kwargs)
        own, noise = (x, None) if dropout is None else _dropped(dropout, x)
        A, B, scale = thin(view)
        if y is None:
            if linear is not None and own is x and type(scale) is float and A.dtype == x.dtype:
                return linear_low_rank(x, linear.weight, linear.bias, A, B, scale, noise)
            y = path(x, *args, **kwargs)
        if (
            forward
            or backward
            or backward_pre
            or GLOBAL_HOOKS[0]
            or GLOBAL_HOOKS[1]
            or GLOBAL_HOOKS[2]
            or (packed and _is_view(y))
        ):
            y = y.clone()
        return add_low_rank(y, own, A, B, scale, noise)

    return run


def _dropped(dropout: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Noise | None]:
    """What an update reads, and the noise that it is still to be multiplied by: in training the product is not kept, unless
    somebody looks at what drops, or has put it there."""
    if not isinstance(dropout, nn.Dropout) or not is_unwatched(dropout):
        return dropout(x), None
    if not dropout.training or dropout.p == 0:
        return x, None
    if not torch.is_grad_enabled() or is_traced():
        return dropout(x), None
    return x, Noise.of(x, dropout.p)


def _thin(path: Path, under: Under, part: Part) -> Path:
    update = update_of_thin(under, part)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = path(x, *args, **kwargs)
        return (y + update(x)).to(y.dtype)

    return run


def update_of_thin(under: Under, part: Part) -> Callable[[Tensor], Tensor]:
    """`x -> s B A x`, with the layer's own geometry."""
    thin, view, dropout, backend, inner = part.lowering("thin"), part.view, part.dropout, under.backend, under.inner
    modules, fixed = part.modules, part.scale

    def update(x: Tensor) -> Tensor:
        if dropout is not None and x.is_floating_point():
            x = dropout(x)
        if modules is not None:
            h = modules[0](x, by=partial(backend.down, inner))
            return modules[1](h, by=partial(backend.up, inner)) * fixed
        A, B, scale = thin(view)
        h = backend.down(inner, A, x.to(A.dtype) if x.is_floating_point() else x)
        return backend.up(inner, B, h) * scale

    return update


def _rescaled(path: Path, under: Under, part: Part) -> Path:
    """Base and update as one function in training, where the base allows it and nothing is dropped."""
    rescaled, view, beside = part.lowering("rescaled"), part.view, _branch(path, under, part)
    base = under.base

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(base) is nn.Linear and torch.is_grad_enabled() and not args and not kwargs and not _drops(part):
            A, B, scale, gain = rescaled(view)
            if type(scale) is float and A.dtype == x.dtype and is_bare(base, x):
                return linear_rescaled(x, base.weight, base.bias, A, B, scale, gain)
        return beside(x, *args, **kwargs)

    return run


def update_of_rescaled(under: Under, part: Part) -> Callable[[Tensor, Tensor], Tensor]:
    """`x, y -> Δy` for `W' = g ∘ (W + s B A)`: what the base itself gives is multiplied too, but for its bias.

    An adapter that drops inputs, in training, drops them for all that it adds, as the reference computes it: then the base
    runs once more.
    """
    rescaled, view, backend, inner = part.lowering("rescaled"), part.view, under.backend, under.inner
    lead = [1] * (-1 - backend.output_axis) if backend.output_axis < 0 else None

    def along(vector: Tensor, y: Tensor) -> Tensor:
        return vector if lead == [] else vector.view(-1, *[1] * (y.dim() - 1 - backend.output_axis))

    def update(x: Tensor, y: Tensor) -> Tensor:
        A, B, scale, gain = rescaled(view)
        own = y
        if part.dropout is not None and x.is_floating_point() and _drops(part):
            x = part.dropout(x)
            own = under.base(x)
        bias = _bias_below(under)
        if bias is not None:
            own = own - along(bias, y).to(own.dtype)
        h = backend.down(inner, A, x.to(A.dtype) if x.is_floating_point() else x)
        gain = along(gain, y)
        return (gain - 1) * own + backend.up(inner, B, h) * (gain * scale)

    return update


def update_beside(under: Under, part: Part) -> Callable[[Tensor, Tensor], Tensor]:
    """`x, y0 -> Δy` of a method that reads the layer's output."""
    is_rescaled = "rescaled" in part.tuner.lowerings
    return update_of_rescaled(under, part) if is_rescaled else update_of_branch(under, part)


def _branch(path: Path, under: Under, part: Part) -> Path:
    update = update_beside(under, part)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = path(x, *args, **kwargs)
        return (y + update(x, y)).to(y.dtype)

    return run


def update_of_branch(under: Under, part: Part) -> Callable[[Tensor, Tensor], Tensor]:
    """`x, y0 -> Δy`; ids go in as they are."""
    branch, view, dropout = part.lowering("branch"), part.view, part.dropout
    backend, inner = under.backend, under.inner

    def update(x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = (x if dropout is None else dropout(x)).to(view.dtype())
        return backend.scaled(inner, branch(view, x, y))

    return update


def _vectors(path: Path, under: Under, part: Part) -> Path:
    exchange, base = exchange_of_vectors(under, part), under.base
    fresh, packed = base is under.inner and under.backend.gives_fresh, under.backend.opens_anew

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = path(x, *args, **kwargs)
        return exchange(x, y if fresh and not _is_hooked(base) and not (packed and _is_view(y)) else y.clone())

    return run


def _is_view(y: Tensor) -> bool:
    """Whether it is a view: one that a library's own function of autograd made may not be written to."""
    return not is_traced() and y._is_view()


def _is_hooked(base: nn.Module) -> bool:
    """Whether anybody but the caller may have the layer's output."""
    return any(own_hooks(base)) or any(GLOBAL_HOOKS)


def exchange_of_vectors(under: Under, part: Part) -> Callable[[Tensor, Tensor], Tensor]:
    """`x, y -> y` with the method's vectors in place; `y` may be written to."""
    vectors, view, backend, inner = part.lowering("vectors"), part.view, under.backend, under.inner

    def exchange(x: Tensor, y: Tensor) -> Tensor:
        index, values = vectors(view)
        return backend.exchanged(inner, index, values, x, y)

    return exchange


def _input(path: Path, change: Callable[[Tensor], Tensor]) -> Path:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return path(change(x), *args, **kwargs)

    return run


def _output(path: Path, change: Callable[[Tensor], Tensor]) -> Path:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return change(path(x, *args, **kwargs))

    return run


def change_of_input(under: Under, part: Part) -> Callable[[Tensor], Tensor]:
    """The method's map of the layer's input."""
    axis = under.backend.input_axis or 0
    plain = _along(part.lowering("input"), part.view, axis)
    if not part.tuner.recomputes_input:
        return plain

    def run(x: Tensor) -> Tensor:
        return _recomputed_input(part, x, axis) if can_recompute(x) else plain(x)

    return run


def _recomputed_input(part: Part, x: Tensor, axis: int) -> Tensor:
    slots = part.view.tensors()
    fixed = part.fixed(part.view.training)  # backward does what forward did, whatever the mode is then

    def change(x: Tensor, *tensors: Tensor) -> Tensor:
        over = fixed.over(dict(zip(slots, tensors, strict=True)))
        return _along(over.lowering("input"), over.view, axis)(x)

    return recomputed(change, x, list(slots.values()))


def change_of_output(under: Under, part: Part) -> Callable[[Tensor], Tensor]:
    """The method's map of the layer's output."""
    output = part.lowering("output")
    if part.tuner.spares_bias:
        output = _around_bias(under, output)
    return _along(output, part.view, under.backend.output_axis)


def _around_bias(under: Under, output: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`y -> o(y - b) + b`, as `o(y) + (b - o(b))`: one more pass over a vector instead of two over the output."""

    def run(view: LayerView, rows: Tensor) -> Tensor:
        bias = _bias_below(under)
        if bias is None:
            return output(view, rows)
        bias = bias.to(rows.dtype)
        return output(view, rows) + (bias - output(view, bias))

    return run


def _bias_below(under: Under) -> Tensor | None:
    """What the base adds to its output; methods between may have changed it."""
    between = under.between()
    return adapted(under, between).get("bias") if between else tensor_of(under.inner, "bias")


def _along(change: Callable[..., Tensor], view: LayerView, axis: int) -> Callable[[Tensor], Tensor]:
    """A map of features, which lie along `axis`, in the adapter's dtype."""

    def run(x: Tensor) -> Tensor:
        rows = x if axis == -1 else x.movedim(axis, -1)
        rows = change(view, rows.to(view.dtype())).to(x.dtype)
        return rows if axis == -1 else rows.movedim(-1, axis)

    return run


def _through_parameters(under: Under, parts: Sequence[Part]) -> Path:
    refuse_waiting(parts)
    for part in parts:
        form_of_output(part)  # now, and not in a call

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return through_parameters(under, [*under.between(), *parts], args, kwargs)

    return run


def through_parameters(under: Under, parts: Sequence[Part], args: Any, kwargs: Any) -> Tensor:
    """The base layer's own forward with the adapters folded into its parameters.

    In training, an adapter that drops inputs gets a run of the layer for its own part.
    """
    if not any(_drops(part) for part in parts):
        return _run(under, parts, None, args, kwargs)
    x, *rest = args
    y = _run(under, [], None, args, kwargs)
    for count, part in enumerate(parts):
        own = part.dropout(x) if part.dropout is not None and x.is_floating_point() else x
        y = y + _run(under, parts[: count + 1], count, (own, *rest), kwargs)
    return y


def _drops(part: Part) -> bool:
    """Whether an adapter's input may differ from the layer's: in training, and where somebody hooks what drops it."""
    dropout = part.dropout
    if dropout is None or part.view.training:
        return dropout is not None
    return isinstance(dropout, nn.Module) and any(own_hooks(dropout))


def _run(under: Under, parts: Sequence[Part], beyond: int | None, args: Any, kwargs: Any) -> Tensor:
    """The base layer with adapters folded in, or with what they add beyond the first so many of them.

    Plain linear layers do not keep what was folded for backward, but fold again.
    """
    once = None if under.backend.opens_anew else opened(under)
    trained = trained_of(under)

    def fold(parts: Sequence[Part], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        running, pristine = opened(under) if once is None else once
        now = {**running, **trained}
        found = folded(under, parts, now, pristine)
        before = {} if beyond is None else folded(under, parts[:beyond], now, pristine)
        return {name: tensor - before[name] if name in before else tensor for name, tensor in found.items()}

    alone = len(args) == 1 and not kwargs and torch.is_grad_enabled()
    if alone and under.backend.can_refold(under.inner, args[0]):
        return _linear_folded(fold, parts, args[0], trained)
    return under.backend.run(under.inner, fold(parts, trained), args, kwargs)


def _linear_folded(
    fold: Callable[[Sequence[Part], Mapping[str, Tensor]], Mapping[str, Tensor]],
    parts: Sequence[Part],
    x: Tensor,
    trained: Mapping[str, Tensor],
) -> Tensor:
    """`trained` are parameters of the layer itself that train along, such as its bias."""
    slots = [part.view.tensors() for part in parts]
    parts = [part.fixed(part.view.training) for part in parts]  # backward folds as forward did

    def refold(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        rest = iter(tensors)
        over = [part.over({name: next(rest) for name in own}) for part, own in zip(parts, slots, strict=True)]
        folded = fold(over, dict(zip(trained, rest, strict=True)))
        weight, bias = folded["weight"], folded.get("bias")
        return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

    return linear_folded(x, refold, [*(tensor for own in slots for tensor in own.values()), *trained.values()])
