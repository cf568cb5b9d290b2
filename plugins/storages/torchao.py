"""torchao's weights: a plain linear layer whose `weight` is a tensor of the library's own, of one class for each form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

from peftc import plugin as p


class Torchao(p.Storage):
    """torchao (int8, int4, other whole numbers, float8)"""

    name: ClassVar[str] = "torchao"
    package: ClassVar[str] = "torchao"
    tensors: ClassVar[tuple[str, ...]] = ("torchao.utils.TorchAOBaseTensor",)

    def cannot_pack(self, layer: Any) -> str:
        form = type(layer.weight).__name__
        return "" if form in _PACKED else f"torchao makes no {form} from numbers and its own settings alone"

    def facts(self, layer: Any) -> p.Packed:
        weight = layer.weight
        out, into = weight.shape
        name = p.dtype_name(weight.dtype)
        return p.Packed(self.name, into, out, name, p.bytes_of(weight), passes_gradients=_passes_gradients(weight))

    def open(self, layer: Any) -> p.Tensor:
        import torch

        weight = layer.weight
        if type(weight).dequantize is not torch.Tensor.dequantize:
            return cast("p.Tensor", weight.dequantize())
        ones = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return torch.nn.functional.linear(ones, weight).t()  # packed for a kernel: only that can read it

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        import torch

        own = layer.weight
        made = _PACKED[type(own).__name__](own, weight.to(own.dtype).to(own.device))
        return {"weight": torch.nn.Parameter(made, requires_grad=False)}


def _passes_gradients(weight: Any) -> bool:
    """Whether the library has a derivative: it has none where it rounds inputs too, and none for a CPU's kernel of int4."""
    rounds = any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))
    return not rounds and type(weight).__name__ != "Int4OpaqueTensor"


def _int8(own: Any, weight: p.Tensor) -> Any:
    return type(own).from_hp(
        weight,
        granularity=_granularity(own),
        act_quant_kwargs=own.act_quant_kwargs,
        act_quant_scale=own.act_quant_scale,
        act_quant_zero_point=own.act_quant_zero_point,
        act_pre_scale=own.act_pre_scale,
        reduce_range=own.reduce_range,
    )


def _float8(own: Any, weight: p.Tensor) -> Any:
    return type(own).from_hp(
        weight,
        float8_dtype=own.qdata.dtype,
        granularity=_granularity(own),
        mm_config=own.mm_config,
        act_quant_kwargs=own.act_quant_kwargs,
        kernel_preference=own.kernel_preference,
    )


def _granularity(own: Any) -> Any:
    """Which numbers share a scale: those of a row, those of a block, or all."""
    from torchao.quantization.granularity import PerBlock, PerRow, PerTensor

    rows, columns = own.block_size
    if columns < own.shape[1]:
        return PerBlock((rows, columns))
    return PerRow() if rows == 1 else PerTensor()


def _whole(own: Any, weight: p.Tensor) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    mapping = MappingType.ASYMMETRIC if bool(own.zero_point.any()) else MappingType.SYMMETRIC
    block, rounding = tuple(own.block_size), own.activation_quantization
    return type(own).from_hp(weight, block, own.target_dtype, mapping_type=mapping, activation_quantization=rounding)


def _opaque(own: Any, weight: p.Tensor) -> Any:
    return type(own).from_hp(weight, own.block_size)


#: how a tensor of each class is made as another of it was
_PACKED: Mapping[str, Callable[[Any, p.Tensor], Any]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _whole,
    "Int4OpaqueTensor": _opaque,
}

peftc_storage = p.storing(Torchao())
