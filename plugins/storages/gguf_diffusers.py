"""Blocks of GGUF files as diffusers' layers keep them: a parameter of bytes that knows its type of ggml's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .gguf_transformers import blocks_of, why_not_made
from .opening import bytes_of, forward_by, product


class GgufOfDiffusers(p.Storage):
    """blocks of GGUF (diffusers)"""

    name: ClassVar[str] = "gguf-diffusers"
    package: ClassVar[str] = "diffusers"
    classes: ClassVar[tuple[str, ...]] = ("diffusers.quantizers.gguf.utils.GGUFLinear",)

    def holds(self, layer: Any) -> bool:
        return "quant_type" in layer.weight.__dict__  # others of the class are not loaded yet, or hold plain numbers

    def cannot_pack(self, layer: Any) -> str:
        return why_not_made(int(layer.weight.quant_type))

    def facts(self, layer: Any) -> p.Packed:
        dtype = "float32" if layer.compute_dtype is None else p.dtype_name(layer.compute_dtype)
        return p.Packed(self.name, layer.in_features, layer.out_features, dtype, bytes_of(layer, self.held))

    def settings(self, layer: Any) -> Mapping[str, Any]:
        """The kernel for GPUs gives no gradient to inputs, and without it each opened weight would be kept for backward."""
        return forward_by(_forward, layer)

    def open(self, layer: Any) -> p.Tensor:
        return _opened(layer, layer.weight)

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        own = layer.weight
        blocks = blocks_of(weight, int(own.quant_type)).to(own.device)
        return {"weight": type(own)(blocks, quant_type=own.quant_type)}


def _opened(layer: Any, blocks: Any) -> p.Tensor:
    import torch
    from diffusers.quantizers.gguf import utils

    module: Any = utils
    opened: p.Tensor = module.dequantize_gguf_tensor(blocks).to(layer.compute_dtype or torch.float32)
    return opened


def _forward(layer: Any, x: p.Tensor) -> p.Tensor:
    blocks = layer.weight
    if not x.requires_grad:
        own: p.Tensor = type(layer).forward(layer, x)
        return own
    opened_in = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(opened_in)
    return product(x.to(opened_in), lambda: _opened(layer, blocks), bias)


peftc_storage = p.storing(GgufOfDiffusers())
