"""optimum-quanto's linear layers: whole numbers of 8 bits or fewer, or float8, with a scale for each row or group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from peftc import plugin as p


class Quanto(p.Storage):
    """optimum-quanto (int8, int4, int2, float8)"""

    name: ClassVar[str] = "quanto"
    package: ClassVar[str] = "optimum-quanto"
    classes: ClassVar[tuple[str, ...]] = ("optimum.quanto.nn.qlinear.QLinear",)

    def holds(self, layer: Any) -> bool:
        return layer.weight_qtype is not None

    def facts(self, layer: Any) -> p.Packed:
        weight = layer.qweight if layer.weight.is_meta else layer.weight  # where nothing is loaded yet: what will be
        out, into = weight.shape
        return p.Packed(self.name, into, out, p.dtype_name(weight.dtype), p.bytes_of(weight))

    def open(self, layer: Any) -> p.Tensor:
        return cast(
            "p.Tensor", layer.qweight.dequantize()
        )  # the weight, or what a call makes of one that is not frozen

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        import copy

        import torch

        other = copy.copy(layer)
        own = layer.weight
        numbers = torch.nn.Parameter(weight.to(own.dtype).to(own.device), requires_grad=False)
        other._parameters = {**layer._parameters, "weight": numbers}
        return {"weight": torch.nn.Parameter(other.qweight, requires_grad=False)}


peftc_storage = p.storing(Quanto())
