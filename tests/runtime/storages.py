"""A storage made for these tests: rows of whole numbers with a scale each, held by a buffer, a parameter and an attribute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc import plugin as p

#: what the largest number of a row becomes
LARGEST = 100


class Rounded(nn.Module):
    """A linear layer of rounded rows: `codes` (out, in) of int8 times `scale` (out, 1); `tag` says how it was made."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        made = rounded(weight)
        self.register_buffer("codes", made["codes"])
        self.scale = made["scale"]
        self.tag = made["tag"]
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.drifts = True

    def numbers(self) -> Tensor:
        assert isinstance(self.codes, Tensor) and self.tag == float(self.scale.sum())
        return self.codes * self.scale.detach()

    def forward(self, x: Tensor) -> Tensor:
        if self.drifts and not self.training:
            self.codes.add_(1)  # as libraries do that pack anew for a kernel
        return F.linear(x, self.numbers(), self.bias)


def rounded(weight: Tensor) -> dict[str, Any]:
    """What holds a weight."""
    scale = weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-9) / LARGEST
    codes = (weight.detach() / scale).round().to(torch.int8)
    return {"codes": codes, "scale": nn.Parameter(scale, requires_grad=False), "tag": float(scale.sum())}


class RoundedStorage(p.Storage):
    """Rounded rows"""

    name = "rounded"
    package = "rounding"
    classes = (f"{__name__}.Rounded",)
    held = ("codes", "scale", "tag")

    def facts(self, layer: Any) -> p.Packed:
        out, into = layer.out_features, layer.in_features
        return p.Packed(self.name, into, out, "float32", out * into + 4 * out)

    def settings(self, layer: Any) -> Mapping[str, Any]:
        return {"drifts": False}

    def open(self, layer: Any) -> Tensor:
        opened: Tensor = layer.numbers()
        return opened

    def pack(self, layer: Any, weight: Tensor) -> Mapping[str, Any]:
        return rounded(weight)


class Sealed(RoundedStorage):
    """Rounded rows that take no others"""

    unwritable = "its rows are counted"


def packed(model: nn.Module) -> nn.Module:
    """A model with all its linear layers rounded."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, Rounded(child.weight, child.bias))
    return model


def opened(model: nn.Module) -> nn.Module:
    """A model with its rounded layers as plain ones of the same numbers."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Rounded):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                plain.weight = nn.Parameter(child.numbers())
                plain.bias = None if child.bias is None else nn.Parameter(child.bias.detach().clone())
                setattr(parent, name, plain)
    return model
