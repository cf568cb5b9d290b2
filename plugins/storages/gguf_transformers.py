"""Blocks of GGUF files as transformers' layers keep them: rows of bytes of one of ggml's types.

Loading keeps them where the kernel of the hub can be had. Types of K and I are made by ggml alone: nothing else can be packed so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .opening import bytes_of, forward_by, product

#: ggml's types that the package gguf makes (0.10), by their number: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16, TQ1_0, TQ2_0
MADE_IN_PYTHON = frozenset({2, 3, 6, 7, 8, 30, 34, 35})


class GgufOfTransformers(p.Storage):
    """blocks of GGUF (transformers)"""

    name: ClassVar[str] = "gguf-transformers"
    package: ClassVar[str] = "gguf"
    classes: ClassVar[tuple[str, ...]] = ("transformers.integrations.gguf.utils.GgufLinear",)

    def cannot_pack(self, layer: Any) -> str:
        return why_not_made(int(layer.ggml_type))

    def facts(self, layer: Any) -> p.Packed:
        return p.Packed(self.name, layer.in_features, layer.out_features, "float32", bytes_of(layer, self.held))

    def settings(self, layer: Any) -> Mapping[str, Any]:
        """The kernel for few rows gives no gradient to inputs, and is not there on every device."""
        return forward_by(_forward, layer)

    def open(self, layer: Any) -> p.Tensor:
        return _opened(layer, layer.weight, None)

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        import torch

        order = layer.input_permutation
        columns = weight if order is None else weight.index_select(1, order.to(weight.device))
        blocks = blocks_of(columns, int(layer.ggml_type)).to(layer.weight.device)
        return {"weight": torch.nn.Parameter(blocks, requires_grad=False)}


def why_not_made(kind: int) -> str:
    """Why weights cannot be put into blocks of a type; empty if they can."""
    from importlib.util import find_spec

    if kind not in MADE_IN_PYTHON:
        return f"no Python package makes blocks of ggml's type {kind}; ggml alone does"
    return "" if find_spec("gguf") else "it takes the package gguf, which is not installed: `pip install gguf`"


def blocks_of(weight: p.Tensor, kind: int) -> p.Tensor:
    """A weight (out, in) as rows of bytes."""
    import gguf
    import torch

    values = weight.detach().float().cpu().contiguous().numpy()
    return torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind)).copy())


def _opened(layer: Any, blocks: p.Tensor, dtype: Any) -> p.Tensor:
    import torch
    from transformers.integrations.gguf.kernels import dequantize_blocks

    sizes = (layer.out_features, layer.in_features)
    found: p.Tensor = dequantize_blocks(blocks, layer.ggml_type, *sizes, dtype or torch.float32)
    order = layer.input_permutation
    return found if order is None else found.index_select(1, order.argsort())


def _forward(layer: Any, x: p.Tensor) -> p.Tensor:
    from transformers.integrations.gguf.kernels import kernel_can_read

    blocks = layer.weight
    if not x.requires_grad and kernel_can_read(blocks):
        own: p.Tensor = type(layer).forward(layer, x)
        return own
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return product(x, lambda: _opened(layer, blocks, x.dtype), bias)


peftc_storage = p.storing(GgufOfTransformers())
