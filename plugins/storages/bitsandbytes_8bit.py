"""bitsandbytes' 8-bit layers: each row of the weight scaled to whole numbers (Dettmers et al., arXiv:2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from peftc import plugin as p

#: what the largest number of a row becomes
LARGEST = 127


class EightBit(p.Storage):
    """bitsandbytes, 8 bits (LLM.int8())"""

    name: ClassVar[str] = "bitsandbytes-8bit"
    known_as: ClassVar[str] = "bnb 8bit"
    package: ClassVar[str] = "bitsandbytes"
    classes: ClassVar[tuple[str, ...]] = ("bitsandbytes.nn.modules.Linear8bitLt",)
    held: ClassVar[tuple[str, ...]] = ("weight", "state")

    def holds(self, layer: Any) -> bool:
        return not layer.state.has_fp16_weights

    def facts(self, layer: Any) -> p.Packed:
        out, into = layer.out_features, layer.in_features
        return p.Packed(self.name, into, out, "float32", out * into + out * 4)

    def open(self, layer: Any) -> p.Tensor:
        weight = layer.weight
        if weight.is_floating_point():  # not packed yet
            return cast("p.Tensor", weight.data)
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        opened: p.Tensor = weight.data.float() * (scale.to(weight.device) / LARGEST).unsqueeze(1)
        return opened

    def example(self, layer: Any) -> Any:
        import bitsandbytes.nn as library

        layers: Any = library
        made = layers.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
        )
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        import copy

        import torch

        own = layer.weight
        made = type(own)(weight.to(torch.float16).cpu(), requires_grad=False, has_fp16_weights=False).to(own.device)
        state = copy.copy(layer.state)
        state.CB = state.SCB = None  # the layer takes those of its weight when it is called
        return {"weight": made, "state": state}


peftc_storage = p.storing(EightBit())
