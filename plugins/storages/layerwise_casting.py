"""diffusers' layerwise casting: numbers of few bits at rest, cast for each call of their layer (`enable_layerwise_casting`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .opening import bytes_of

#: what diffusers calls the hook, and the attribute that has a layer's hooks (0.33)
HOOK, HOOKS = "layerwise_casting", "_diffusers_hook"


class Layerwise(p.Storage):
    """layerwise casting (diffusers)"""

    name: ClassVar[str] = "layerwise-casting"
    package: ClassVar[str] = "diffusers"
    classes: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear",)

    def holds(self, layer: Any) -> bool:
        hooks = layer.__dict__.get(HOOKS)
        if hooks is None or hooks.get_hook(HOOK) is None:
            return False
        from torch import nn

        return type(layer).forward is nn.Linear.forward

    def facts(self, layer: Any) -> p.Packed:
        dtype = p.dtype_name(layer.__dict__[HOOKS].get_hook(HOOK).compute_dtype)
        return p.Packed(self.name, layer.in_features, layer.out_features, dtype, bytes_of(layer, self.held))

    def open(self, layer: Any) -> p.Tensor:
        opened: p.Tensor = layer.weight.detach().to(layer.__dict__[HOOKS].get_hook(HOOK).compute_dtype)
        return opened

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        import torch

        own = layer.weight
        largest = torch.finfo(own.dtype).max
        made = weight.float().clamp(-largest, largest).to(own.device, own.dtype)  # beyond it some would be no numbers
        return {"weight": torch.nn.Parameter(made, requires_grad=False)}


peftc_storage = p.storing(Layerwise())
