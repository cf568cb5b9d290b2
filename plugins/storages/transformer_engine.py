"""transformer-engine's linear layers: a plain weight, multiplied by kernels of its own, in FP8 inside of `fp8_autocast`.

It computes on GPUs alone: known here by its documented shape, and stood in for in tests. Layers that are a part of a tensor-parallel
one, give their bias beside the output, or hold FP8 themselves, are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .opening import bytes_of


class TransformerEngine(p.Storage):
    """linear layers of transformer-engine"""

    name: ClassVar[str] = "transformer-engine"
    package: ClassVar[str] = "transformer_engine"
    classes: ClassVar[tuple[str, ...]] = ("transformer_engine.pytorch.module.linear.Linear",)
    fresh: ClassVar[bool] = False  # a function of autograd makes it

    def holds(self, layer: Any) -> bool:
        from torch import nn

        is_plain = type(layer._parameters.get("weight")) is nn.Parameter
        return is_plain and layer.tp_size == 1 and not layer.return_bias

    def facts(self, layer: Any) -> p.Packed:
        weight = layer.weight
        out, into = weight.shape
        return p.Packed(self.name, into, out, p.dtype_name(weight.dtype), bytes_of(layer, self.held))

    def open(self, layer: Any) -> p.Tensor:
        opened: p.Tensor = layer.weight.detach()
        return opened

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        from torch import nn

        own = layer.weight
        made = nn.Parameter(weight.to(own.device, own.dtype), requires_grad=own.requires_grad)
        made.__dict__.update(own.__dict__)  # what it notes of tensor parallelism
        return {"weight": made}


peftc_storage = p.storing(TransformerEngine())
