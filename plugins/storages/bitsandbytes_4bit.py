"""bitsandbytes' 4-bit layers: fp4 and nf4 in blocks, the scales quantised once more or not (Dettmers et al., arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from peftc import plugin as p

#: scales that share one where they are quantised too, as the library has them
NESTED_BLOCK = 256
#: bytes of the tables of levels: 16 of the weight; 256 of scales, with their offset
TABLE, NESTED_TABLE = 16 * 4, 256 * 4 + 4


class FourBit(p.Storage):
    """bitsandbytes, 4 bits (fp4, nf4)"""

    name: ClassVar[str] = "bitsandbytes-4bit"
    known_as: ClassVar[str] = "bnb 4bit"
    package: ClassVar[str] = "bitsandbytes"
    classes: ClassVar[tuple[str, ...]] = ("bitsandbytes.nn.modules.Linear4bit",)
    held: ClassVar[tuple[str, ...]] = ("weight", "quant_state")

    def facts(self, layer: Any) -> p.Packed:
        weight = layer.weight
        state = weight.quant_state
        dtype = (
            state.dtype if state is not None else weight.dtype if weight.is_floating_point() else layer.compute_dtype
        )
        count = layer.in_features * layer.out_features
        blocks = -(-count // weight.blocksize)
        if weight.compress_statistics:
            scales = blocks + -(-blocks // NESTED_BLOCK) * 4 + NESTED_TABLE
        else:
            scales = blocks * 4
        nbytes = (count + 1) // 2 + scales + TABLE
        return p.Packed(self.name, layer.in_features, layer.out_features, p.dtype_name(dtype), nbytes)

    def settings(self, layer: Any) -> Mapping[str, Any]:
        """In evaluation the library would pack the weight anew for some CPUs, in place, rounding its scales; from then on it gives no
        gradient to inputs. Where it has, the weight is put back into the order of files."""
        own, wanted = layer.weight, {"support_avx512bf16_for_cpu": False}
        if not getattr(own.quant_state, "packing_format_for_cpu", False):
            return wanted
        data, state = _as_loaded(own.data, own.quant_state)
        return {**wanted, "weight": _like(own, data, quant_state=state, bnb_quantized=True), "quant_state": state}

    def open(self, layer: Any) -> p.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = layer.weight
        if weight.quant_state is None:  # not packed yet: the library does it when the layer is moved
            return cast("p.Tensor", weight.data)
        opened: p.Tensor = dequantize_4bit(*_as_loaded(weight.data, weight.quant_state))
        return opened

    def example(self, layer: Any) -> Any:
        import bitsandbytes.nn as library
        import torch

        layers: Any = library
        made = layers.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        own = layer.weight
        dtype = own.data.dtype if own.quant_state is None else own.quant_state.dtype
        made = _like(own, weight.to(dtype).cpu()).to(own.device)
        return {"weight": made, "quant_state": made.quant_state}


def _like(own: Any, data: p.Tensor, **more: Any) -> Any:
    """A parameter with the settings of another one."""
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    return type(own)(data, requires_grad=False, **{name: getattr(own, name) for name in names}, **more)


def _as_loaded(data: p.Tensor, state: Any) -> tuple[p.Tensor, Any]:
    """A packed weight in the order of files, if a call before the layer was adapted put it into the order of a CPU's kernel."""
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    import copy

    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    found: tuple[p.Tensor, Any] = _convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    if not found[1].nested:  # the library forgets to turn these back
        found[1].absmax = state.absmax.T.reshape(-1).float()
    return found


peftc_storage = p.storing(FourBit())
