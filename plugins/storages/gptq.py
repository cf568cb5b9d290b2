"""GPTQ as gptqmodel's layers store it: 2, 3, 4 or 8 bits in groups of inputs, each with scale and zero (Frantar et al., arXiv:2210.17323).

gptqmodel wants a compiler to be installed: its layers are known here by their documented layout, and stood in for in tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from peftc import plugin as p

from .opening import by_identity, bytes_of
from .words import gather, on_grid, spread

#: modules of gptqmodel whose layers leave the words as files have them; other kernels pack them anew for a device
PLAIN_KERNELS = ("gptqmodel.nn_modules.qlinear.torch", "gptqmodel.nn_modules.qlinear.tritonv2")


class Gptq(p.Storage):
    """GPTQ (gptqmodel)"""

    name: ClassVar[str] = "gptq"
    package: ClassVar[str] = "gptqmodel"
    classes: ClassVar[tuple[str, ...]] = (
        "gptqmodel.nn_modules.qlinear.GPTQQuantLinear",
        "gptqmodel.nn_modules.qlinear.PackableQuantLinear",
    )
    held: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    fresh: ClassVar[bool] = False  # some kernels give a view of what a function of autograd made

    def cannot_pack(self, layer: Any) -> str:
        return "" if _is_plain(layer) else f"the kernel of `{type(layer).__name__}` has packed it anew for its device"

    def facts(self, layer: Any) -> p.Packed:
        nbytes = bytes_of(layer, self.held)
        return p.Packed(self.name, layer.in_features, layer.out_features, p.dtype_name(layer.scales.dtype), nbytes)

    def open(self, layer: Any) -> p.Tensor:
        if not _is_plain(layer):
            return by_identity(layer, layer.in_features, layer.scales)
        group, zeros = layer.g_idx.long(), _zeros(layer)
        codes = spread(layer.qweight, layer.bits)[: group.shape[0]]
        opened = layer.scales[group] * (codes - zeros[group]).to(layer.scales.dtype)
        return cast("p.Tensor", opened.t())

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        own, bits, less = layer.qweight, layer.bits, _less(layer)
        group = layer.g_idx.long() % layer.scales.shape[0]  # some files count from the end
        lowest = None if layer.sym else less  # kernels for symmetric files do not look at zeros
        grid = (layer.scales, _zeros(layer))
        codes, scales, zeros = on_grid(weight.t().to(own.device), group, *grid, 2**bits - 1, lowest)
        stored = gather((zeros - less).t(), bits, layer.qzeros.t()).t().contiguous()
        return {"qweight": gather(codes, bits, own), "scales": scales, "qzeros": stored}


def _is_plain(layer: Any) -> bool:
    return type(layer).__module__ in PLAIN_KERNELS


def _zeros(layer: Any) -> p.Tensor:
    """Zeros (groups, out)."""
    return spread(layer.qzeros.t(), layer.bits).t()[:, : layer.out_features] + _less(layer)


def _less(layer: Any) -> int:
    """By how much zeros are stored less than they are: the first format of files has them less one."""
    return 1 if layer.qzero_format() == 1 else 0


peftc_storage = p.storing(Gptq())
