"""AWQ in the layout GEMM: 4 bits in groups of inputs, eight outputs to a word, out of order (Lin et al., arXiv:2306.00978).

Of gptqmodel, which wants a compiler to be installed, and of AutoAWQ: known by their documented layout, and stood in for in tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .opening import by_identity, bytes_of
from .words import gather, on_grid, spread

#: modules whose layers leave the words as files have them; other kernels pack them anew for a device
PLAIN_KERNELS = (
    "gptqmodel.nn_modules.qlinear.torch_awq",
    "gptqmodel.nn_modules.qlinear.awq_torch",
    "gptqmodel.nn_modules.qlinear.gemm_awq",
    "gptqmodel.nn_modules.qlinear.awq_gemm",
    "awq.modules.linear.gemm",
)
#: which of eight outputs each place of a word holds
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4


class Awq(p.Storage):
    """AWQ (gptqmodel, AutoAWQ)"""

    name: ClassVar[str] = "awq"
    package: ClassVar[str] = "gptqmodel"
    classes: ClassVar[tuple[str, ...]] = (
        "gptqmodel.nn_modules.qlinear.AWQuantLinear",
        "awq.modules.linear.gemm.WQLinear_GEMM",
    )
    held: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    fresh: ClassVar[bool] = False  # some kernels give a view of what a function of autograd made

    def cannot_pack(self, layer: Any) -> str:
        return "" if _is_plain(layer) else f"the kernel of `{type(layer).__name__}` has packed it anew for its device"

    def facts(self, layer: Any) -> p.Packed:
        nbytes = bytes_of(layer, self.held)
        return p.Packed(self.name, layer.in_features, layer.out_features, p.dtype_name(layer.scales.dtype), nbytes)

    def open(self, layer: Any) -> p.Tensor:
        if not _is_plain(layer):
            return by_identity(layer, layer.in_features, layer.scales)
        group = _group(layer)
        codes, zeros = (_in_order(spread(words.t(), BITS)) for words in (layer.qweight, layer.qzeros))
        opened: p.Tensor = layer.scales.t()[:, group] * (codes - zeros[:, group]).to(layer.scales.dtype)
        return opened

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        own = layer.qweight
        zeros = _in_order(spread(layer.qzeros.t(), BITS)).t()
        codes, scales, zeros = on_grid(weight.t().to(own.device), _group(layer), layer.scales, zeros, 2**BITS - 1, 0)
        made = {"qweight": (codes, own), "qzeros": (zeros, layer.qzeros)}
        words = {name: gather(_out_of_order(found.t()), BITS, like.t()) for name, (found, like) in made.items()}
        return {**{name: found.t().contiguous() for name, found in words.items()}, "scales": scales}


def _is_plain(layer: Any) -> bool:
    return type(layer).__module__ in PLAIN_KERNELS


def _group(layer: Any) -> p.Tensor:
    """The group of each input."""
    import torch

    per_group = layer.in_features // layer.scales.shape[0]
    return torch.arange(layer.in_features, device=layer.scales.device).div(per_group, rounding_mode="floor")


def _in_order(rows: p.Tensor) -> p.Tensor:
    """Rows (out, …) as words hold them, in the order of outputs."""
    return _taken(rows, [ORDER.index(place) for place in range(len(ORDER))])


def _out_of_order(rows: p.Tensor) -> p.Tensor:
    return _taken(rows, list(ORDER))


def _taken(rows: p.Tensor, order: list[int]) -> p.Tensor:
    return rows.reshape(-1, len(order), rows.shape[1])[:, order].reshape(rows.shape)


peftc_storage = p.storing(Awq())
