"""Convolutions of one to three dimensions, grouped ones too: linear maps of patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.runtime.bases.backend import Backend


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


def _groups(base: nn.Module) -> int:
    assert isinstance(base, nn.modules.conv._ConvNd)
    return base.groups


def _in_channels(base: nn.Module) -> int:
    assert isinstance(base, nn.modules.conv._ConvNd)
    return base.in_channels


def _kernel_size(base: nn.Module) -> tuple[int, ...]:
    assert isinstance(base, nn.modules.conv._ConvNd)
    return base.kernel_size
