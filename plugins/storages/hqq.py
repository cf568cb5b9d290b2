"""HQQ's linear layers: groups of whole numbers whose zeros are fitted to the weight (Badri and Shaji, half-quadratic quantisation)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

from peftc import plugin as p


class Hqq(p.Storage):
    """HQQ (1 to 8 bits)"""

    name: ClassVar[str] = "hqq"
    package: ClassVar[str] = "hqq"
    classes: ClassVar[tuple[str, ...]] = ("hqq.core.quantize.HQQLinear",)
    held: ClassVar[tuple[str, ...]] = ("W_q", "meta")

    def holds(self, layer: Any) -> bool:
        return bool(layer.ready)

    def facts(self, layer: Any) -> p.Packed:
        nbytes = p.bytes_of(layer.W_q, *_tensors(layer.meta))
        dtype = p.dtype_name(layer.compute_dtype)
        return p.Packed(self.name, layer.in_features, layer.out_features, dtype, nbytes)

    def open(self, layer: Any) -> p.Tensor:
        return cast("p.Tensor", layer.dequantize())

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        import copy

        settings = copy.deepcopy(layer.quant_config)
        config = {**settings, "offload_meta": layer.offload_meta}
        made = type(layer)(None, config, compute_dtype=layer.compute_dtype, device=layer.device)
        made.quantize(weight, **settings)
        return {"W_q": made.W_q, "meta": made.meta}


def _tensors(meta: Mapping[str, Any]) -> Iterator[p.Tensor]:
    """Scales and zeros, and what these are packed with where they are packed too."""
    import torch

    for value in meta.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


peftc_storage = p.storing(Hqq())
