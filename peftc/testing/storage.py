"""A storage that needs no library, as small as one can be: rows of whole numbers with a scale each. What methods do on packed layers
is checked on it, and whoever writes a storage may begin from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.graph.nodes import Packed
from peftc.registry.storages import default_storages
from peftc.tuner.storage import Storage

#: what the largest number of a row becomes
LARGEST = 127


class RoundedLinear(nn.Module):
    """A linear layer of rounded rows: `codes` (out, in) of int8 times `scale` (out, 1), about the number `middle`."""

    codes: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        made = rounded(weight)
        self.register_buffer("codes", made["codes"])
        self.scale, self.middle = made["scale"], made["middle"]
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def numbers(self) -> Tensor:
        """The weight, `(out, in)`."""
        return self.codes * self.scale.detach() + self.middle

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` -> `(..., out)`."""
        return F.linear(x, self.numbers(), self.bias)


def rounded(weight: Tensor) -> dict[str, Any]:
    """What holds a weight: a buffer, a parameter, and an attribute that is no tensor."""
    middle = float(weight.detach().mean())
    about = weight.detach() - middle
    scale = about.abs().amax(1, keepdim=True).clamp(min=1e-9) / LARGEST
    codes = (about / scale).round().to(torch.int8)
    return {"codes": codes, "scale": nn.Parameter(scale, requires_grad=False), "middle": middle}


class RoundedRows(Storage):
    """Rounded rows, made for checks"""

    name: ClassVar[str] = "rounded-rows"
    classes: ClassVar[tuple[str, ...]] = (f"{__name__}.RoundedLinear",)
    held: ClassVar[tuple[str, ...]] = ("codes", "scale", "middle")

    def facts(self, layer: Any) -> Packed:
        out, into = layer.out_features, layer.in_features
        return Packed(self.name, into, out, "float32", out * into + 4 * out)

    def example(self, layer: nn.Linear) -> nn.Module:
        return RoundedLinear(layer.weight, layer.bias)

    def open(self, layer: Any) -> Tensor:
        opened: Tensor = layer.numbers()
        return opened

    def pack(self, layer: Any, weight: Tensor) -> Mapping[str, Any]:
        return rounded(weight)


ROUNDED = RoundedRows()


@contextmanager
def known(storage: Storage) -> Iterator[None]:
    """Within, layers of this storage are known, installed or not."""
    door = default_storages()
    if storage.name in door.names:
        yield
        return
    door.register(storage)
    try:
        yield
    finally:
        door.forget(storage.name)
