"""How a base layer stores its weight and applies it; the only place that knows kinds of layer.

A backend shows parameters in logical order (weight `(out, in · kernel)`), writes them back, and says what `down` and `up`
of a thin update mean on its layer. Methods never see it, and it knows no method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peftc.diagnostics import PeftcError
from peftc.graph.nodes import Kind
from peftc.host.layers import embedding_scale
from peftc.runtime.places import called_with, computed_elsewhere, tensor_of, tensors_of


class Backend(ABC):
    """One kind of base layer. Stateless."""

    #: dimension of the output, and of the input, that counts features; None when the input has none (ids)
    output_axis: int = -1
    input_axis: int | None = -1
    #: whether `input` on patches equals `input` on features, because there is no window
    patches_are_features: bool = True
    #: whether `y += B A x` may be fused: input and output are plain rows of features
    is_plain_linear: bool = False
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


class LinearBackend(Backend):
    """`nn.Linear`: stored as it is."""

    is_plain_linear = True
    vector_axis: int | None = 0

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor

    def down(self, base: nn.Module, A: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, A)

    def up(self, base: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        return F.linear(h, B)

    def exchanged(self, base: nn.Module, index: Tensor, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        bias, weight = tensor_of(base, "bias"), tensor_of(base, "weight")
        assert weight is not None
        own = F.linear(x, values.to(weight.dtype), None if bias is None else bias[index])
        return y.index_copy_(-1, index, own.to(y.dtype))


class TransposedLinearBackend(LinearBackend):
    """transformers' `Conv1D`: a linear map whose weight is `(in, out)`."""

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if name == "weight" else tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.t().contiguous() if name == "weight" else tensor


class EmbeddingBackend(Backend):
    """`nn.Embedding`: the weight `(num, dim)` is the transposed map from one-hot vectors."""

    input_axis = None
    vector_axis = 1

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if name == "weight" else tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.t().contiguous() if name == "weight" else tensor

    def down(self, base: nn.Module, A: Tensor, x: Tensor) -> Tensor:
        assert isinstance(base, nn.Embedding)
        return F.embedding(x, A.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def up(self, base: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        return self.scaled(base, F.linear(h, B))

    def scaled(self, base: nn.Module, delta: Tensor) -> Tensor:
        scale = embedding_scale(base)
        return delta if scale is None else delta * scale

    def exchanged(self, base: nn.Module, index: Tensor, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        weight = tensor_of(base, "weight")
        assert weight is not None
        ids, order = index.sort()
        place = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        own = self.scaled(base, F.embedding(order[place], values.to(weight.dtype)))
        return torch.where((ids[place] == x).unsqueeze(-1), own.to(y.dtype), y)


class ConvBackend(Backend):
    """`nn.Conv1d/2d/3d`: the weight `(out, in / groups, *kernel)` flattens to `(out, in / groups · kernel)`."""

    output_axis = 1
    input_axis = 1
    patches_are_features = False

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.flatten(1) if name == "weight" else tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.reshape(like.shape)

    def down(self, base: nn.Module, A: Tensor, x: Tensor) -> Tensor:
        assert isinstance(base, nn.modules.conv._ConvNd)
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding: Any = 0
        else:
            padding = base.padding
        kernel = base.kernel_size
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        factor = A.reshape(A.shape[0], -1, *kernel)  # factors may be flat, as the contract has them, or as stored
        groups = base.in_channels // factor.shape[1]
        if groups > 1:  # A is for the channels of one group, as the weight is: each gets it for its own
            factor = factor.repeat(groups, *(1 for _ in factor.shape[1:]))
        h: Tensor = convolve(x, factor, None, base.stride, padding, base.dilation, groups)
        return h

    def up(self, base: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        kernel = _kernel_size(base)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        groups = h.shape[-1 - len(kernel)] // B.shape[1]  # in each group B has a part of what `down` gives
        y: Tensor = convolve(h, B.reshape(*B.shape[:2], *(1 for _ in kernel)), groups=groups)
        return y

    def input_rows(self, weight: Tensor, base: nn.Module, patches: bool) -> Tensor:
        if patches:
            return weight
        groups, channels = _groups(base), _in_channels(base)
        split = weight.reshape(groups, weight.shape[0] // groups, channels // groups, -1)  # g, o/g, i/g, k
        rows = split.transpose(2, 3).reshape(groups, -1, channels // groups)
        full = rows.new_zeros(groups, rows.shape[1], groups, channels // groups)
        full[torch.arange(groups), :, torch.arange(groups)] = rows
        return full.reshape(-1, channels)

    def from_input_rows(self, rows: Tensor, weight: Tensor, base: nn.Module, patches: bool) -> Tensor:
        if patches:
            return rows
        groups, channels = _groups(base), _in_channels(base)
        per_group = channels // groups
        own = rows.reshape(groups, -1, groups, per_group)[torch.arange(groups), :, torch.arange(groups)]
        split = own.reshape(groups, weight.shape[0] // groups, -1, per_group).transpose(2, 3)
        return split.reshape(weight.shape)


class OpaqueBackend(LinearBackend):
    """Norms, and modules of which nothing is known but their parameters: stored as they are, run with others in place."""

    is_plain_linear = False
    is_map = False
    vector_axis = None


def _groups(base: nn.Module) -> int:
    assert isinstance(base, nn.modules.conv._ConvNd)
    return base.groups


def _in_channels(base: nn.Module) -> int:
    assert isinstance(base, nn.modules.conv._ConvNd)
    return base.in_channels


def _kernel_size(base: nn.Module) -> tuple[int, ...]:
    assert isinstance(base, nn.modules.conv._ConvNd)
    return base.kernel_size


class ExpertsBackend(Backend):
    """A module that keeps several weights of its own, such as those of experts `(experts, out, in)`, and uses them as it
    likes: adapters act through its parameters only. A weight `(out, in)` counts as that of one expert."""

    is_map = False

    def __init__(self, transposed: bool) -> None:
        self._transposed = transposed

    def to_logical(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 2:
            return tensor.unsqueeze(0)
        return tensor.transpose(1, 2) if self._transposed and tensor.dim() == 3 else tensor

    def to_stored(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        if self._transposed and like.dim() == 3:
            return tensor.transpose(1, 2).contiguous()
        return tensor.reshape(like.shape)

    def down(self, base: nn.Module, A: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def up(self, base: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError


BACKENDS: Mapping[Kind, Backend] = {
    Kind.LINEAR: LinearBackend(),
    Kind.CONV1D_TRANSPOSED: TransposedLinearBackend(),
    Kind.EMBEDDING: EmbeddingBackend(),
    Kind.CONV1D: ConvBackend(),
    Kind.CONV2D: ConvBackend(),
    Kind.CONV3D: ConvBackend(),
    Kind.NORM: OpaqueBackend(),
    Kind.OTHER: OpaqueBackend(),
    Kind.EXPERTS: ExpertsBackend(transposed=False),
    Kind.EXPERTS_TRANSPOSED: ExpertsBackend(transposed=True),
}
