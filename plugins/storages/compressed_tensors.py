"""compressed-tensors' layers (llm-compressor's files): plain linear layers that a scheme is noted on, packed in one of its formats.

The library opens all layers for good at the model's first call. With adapters they stay packed: each layer opens its weight for its
own call, and again in backward. Layers that were opened before are plain ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .opening import bytes_of, forward_by, product

#: formats and strategies of scales that a weight can be packed in here (0.15)
FORMATS = frozenset({"pack-quantized", "naive-quantized", "int-quantized", "float-quantized"})
STRATEGIES = frozenset({"tensor", "channel", "group"})


class CompressedTensors(p.Storage):
    """compressed-tensors"""

    name: ClassVar[str] = "compressed-tensors"
    package: ClassVar[str] = "compressed-tensors"
    classes: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear",)
    held: ClassVar[tuple[str, ...]] = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape")
    openers: ClassVar[tuple[str, ...]] = (
        "compressed_tensors.compressors.model_compressors.model_compressor"
        ".ModelCompressor.add_decompress_hook.<locals>.ct_decompress_hook",
    )

    def holds(self, layer: Any) -> bool:
        state = layer.__dict__
        return state.get("quantization_status") == "compressed" and state["quantization_scheme"].weights is not None

    def cannot_pack(self, layer: Any) -> str:
        form, strategy = _format(layer), layer.quantization_scheme.weights.strategy
        if form not in FORMATS or strategy not in STRATEGIES:
            return f"its format is {form} with scales by {strategy}"
        return "its inputs are in an order of their own" if "weight_g_idx" in _tensors(layer) else ""

    def facts(self, layer: Any) -> p.Packed:
        scale = layer.weight_scale.dtype
        dtype = p.dtype_name(scale) if scale.itemsize > 1 else "float32"  # those of FP4 are packed too
        return p.Packed(self.name, layer.in_features, layer.out_features, dtype, bytes_of(layer))

    def settings(self, layer: Any) -> Mapping[str, Any]:
        """The library's own forward wants the weight to be open."""
        return forward_by(_forward, layer)

    def open(self, layer: Any) -> p.Tensor:
        return _opened(layer, _tensors(layer))

    def pack(self, layer: Any, weight: p.Tensor) -> Mapping[str, Any]:
        """With the layer's own scales where no others bring a group nearer: so a weight that was packed so is as before."""
        import torch

        own, args = _tensors(layer), layer.quantization_scheme.weights
        form, kept = own["weight_scale"], {name: own[name] for name in own if name.startswith("input_")}
        values = weight.to(form.device, form.dtype)
        candidates = [_with_own_grid(layer, own, values), _with_grid(layer, values, form)]
        packed = [_compressed(layer, {**kept, **candidate}) for candidate in candidates]
        grouped = [_groups(_opened(layer, made) - values, args).abs().amax(-1).reshape(form.shape) for made in packed]
        nearer = grouped[1] < grouped[0]
        chosen = {
            name: torch.where(nearer, candidates[1][name], candidates[0][name]) if name != "weight" else values
            for name in candidates[0]
        }
        made = _compressed(layer, {**kept, **chosen})
        return {n: torch.nn.Parameter(t, requires_grad=False) for n, t in made.items() if n in own and n not in kept}


def _format(layer: Any) -> str:
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.config import CompressionFormat

    scheme = layer.quantization_scheme
    return str(CompressionFormat(scheme.format or infer_module_format(type(layer), scheme)).value)


def _compressor(layer: Any) -> Any:
    from compressed_tensors.compressors.base import BaseCompressor

    return BaseCompressor.get_value_from_registry(_format(layer))


def _tensors(layer: Any) -> dict[str, p.Tensor]:
    own = {**layer._parameters, **layer._buffers}
    return {name: tensor.detach() for name, tensor in own.items() if tensor is not None and name != "bias"}


def _opened(layer: Any, tensors: Mapping[str, p.Tensor]) -> p.Tensor:
    opened: p.Tensor = _compressor(layer).decompress(dict(tensors), layer.quantization_scheme)["weight"]
    return opened.detach()


def _compressed(layer: Any, tensors: Mapping[str, p.Tensor]) -> dict[str, p.Tensor]:
    made: dict[str, p.Tensor] = _compressor(layer).compress(dict(tensors), layer.quantization_scheme)
    return made


def _groups(weight: p.Tensor, args: Any) -> p.Tensor:
    """Numbers that share a scale, in the last dimension."""
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    return weight.reshape(weight.shape[0], -1, args.group_size or weight.shape[1])


def _with_own_grid(layer: Any, own: Mapping[str, p.Tensor], values: p.Tensor) -> dict[str, p.Tensor]:
    opened = _compressor(layer).decompress(dict(own), layer.quantization_scheme)  # zeros may be packed too
    grid = {name: opened[name].detach() for name in ("weight_scale", "weight_zero_point") if name in opened}
    return {"weight": values, **grid}


def _with_grid(layer: Any, values: p.Tensor, like: p.Tensor) -> dict[str, p.Tensor]:
    from compressed_tensors.quantization.utils import calculate_qparams

    args = layer.quantization_scheme.weights
    groups = _groups(values, args)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    zeros = {} if args.symmetric else {"weight_zero_point": zero.reshape(like.shape)}
    return {"weight": values, "weight_scale": scale.reshape(like.shape).to(like.dtype), **zeros}


def _forward(layer: Any, x: p.Tensor) -> p.Tensor:
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    scheme, tensors = layer.quantization_scheme, _tensors(layer)
    if scheme.input_activations:
        rounded = forward_quantize(layer, x.detach(), "input", scheme.input_activations)
        x = rounded + (x - x.detach()) if x.requires_grad else rounded  # the library's own rounding stops gradients
    y = product(x, lambda: _opened(layer, tensors).to(x.dtype), layer.bias)
    return forward_quantize(layer, y, "output", scheme.output_activations) if scheme.output_activations else y


peftc_storage = p.storing(CompressedTensors())
