"""transformers' layers in FP8: float8 numbers with a scale for each block, or one for all (DeepSeek-AI, arXiv:2412.19437).

They compute on GPUs alone, with a kernel of the hub: opening and packing are tested here, calls are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .opening import bytes_of


class FineGrainedFp8(p.Storage):
    """FP8 with a scale for each block (transformers)"""

    name: ClassVar[str] = "fine-grained-fp8"
    package: ClassVar[str] = "transformers"
    classes: ClassVar[tuple[str, ...]] = ("transformers.integrations.finegrained_fp8.FP8Linear",)
    held: ClassVar[tuple[str, ...]] = ("weight", "weight_scale_inv")
    fresh: ClassVar[bool] = False

    def holds(self, layer: Any) -> bool:
        weight = layer.weight  # four bits come as int8, and transformers itself gives those no gradient
        return bool(weight.element_size() == 1 and weight.is_floating_point())

    def facts(self, layer: Any) -> p.Packed:
        nbytes = bytes_of(layer, (*self.held, "activation_scale"))
        return p.Packed(self.name, layer.in_features, layer.out_features, "float32", nbytes)

    def open(self, layer: Any) -> p.Tensor:
        scale = layer.weight_scale_inv.detach().float()
        opened: p.Tensor = layer.weight.detach().float() * _over(scale, layer)
        return opened

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        import torch
        from torch.nn.functional import pad

        own, scale = layer.weight, layer.weight_scale_inv
        largest, values = torch.finfo(own.dtype).max, weight.float().to(own.device)
        if layer.block_size is None:
            found = values.abs().amax()
        else:
            rows, columns = layer.block_size
            whole = pad(values.abs(), (0, -values.shape[1] % columns, 0, -values.shape[0] % rows))
            found = whole.reshape(whole.shape[0] // rows, rows, -1, columns).amax((1, 3))
        scales = (found / largest).clamp(min=torch.finfo(torch.float32).tiny)
        if scale.dtype.itemsize == 1:  # powers of two
            scales = scales.log2().ceil().exp2()
        scales = scales.to(scale.dtype).reshape(scale.shape)
        packed = (values / _over(scales.float(), layer)).clamp(-largest, largest).to(own.dtype)
        made = {"weight": packed, "weight_scale_inv": scales}
        return {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in made.items()}


def _over(scale: p.Tensor, layer: Any) -> p.Tensor:
    """Scales of blocks for each number of the weight."""
    if layer.block_size is None:
        return scale
    rows, columns = layer.block_size
    out, into = layer.weight.shape
    return scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :into]


peftc_storage = p.storing(FineGrainedFp8())
