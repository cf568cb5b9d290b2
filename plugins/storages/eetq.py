"""EETQ's layers in transformers: whole numbers of 8 bits with a scale for each output, in the order of a GPU's kernel.

The kernel is one of the hub for GPUs: known here by the layer of transformers, and tested with a kernel made for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .opening import by_identity, bytes_of


class Eetq(p.Storage):
    """EETQ, 8 bits (transformers)"""

    name: ClassVar[str] = "eetq"
    package: ClassVar[str] = "kernels"
    classes: ClassVar[tuple[str, ...]] = ("transformers.integrations.eetq.EetqLinear",)
    held: ClassVar[tuple[str, ...]] = ("weight", "weight_scales")
    fresh: ClassVar[bool] = False  # a function of autograd makes it

    def holds(self, layer: Any) -> bool:
        return not layer.weight.is_floating_point()

    def facts(self, layer: Any) -> p.Packed:
        into, out = layer.weight.shape
        return p.Packed(self.name, into, out, p.dtype_name(layer.weight_scales.dtype), bytes_of(layer, self.held))

    def open(self, layer: Any) -> p.Tensor:
        """Through the layer: the order of the numbers is the kernel's own."""
        return by_identity(layer, layer.weight.shape[0], layer.weight_scales)

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        import torch
        from transformers.integrations import eetq

        module: Any = eetq
        device, columns = layer.weight.device, weight.to(layer.weight_scales.dtype).t().contiguous().cpu()
        codes, scales = module.eetq_kernels_hub.quant_weights(
            columns, torch.int8, False
        )  # the kernel, once it is loaded
        made = {"weight": codes, "weight_scales": scales}
        return {name: torch.nn.Parameter(tensor.to(device), requires_grad=False) for name, tensor in made.items()}


peftc_storage = p.storing(Eetq())
