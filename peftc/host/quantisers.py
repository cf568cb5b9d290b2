"""How transformers' quantisers make a model: asked on the meta device, so that a plan sees the layers that loading gives.

transformers packs some libraries' weights before they are loaded, and others' one by one while they are; here both are done to
a model without storage, by the quantiser's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

#: Libraries whose packed files come to the same layers as packing the weights does; the other quantisers make a model for
#: packed files with the packed layers in it.
_PACKED_ALIKE = frozenset({"bitsandbytes", "torchao", "quanto"})

Build = Callable[[torch.dtype], PreTrainedModel]


def is_known(method: str) -> bool:
    """Whether transformers has such a quantisation, one that was registered with it included.

    Relied on: `AUTO_QUANTIZATION_CONFIG_MAPPING`, by `quant_method` with `_4bit` and `_8bit` for bitsandbytes (4.48).
    """
    return method in AUTO_QUANTIZATION_CONFIG_MAPPING or f"{method}_4bit" in AUTO_QUANTIZATION_CONFIG_MAPPING


def config_of(options: Mapping[str, Any]) -> Any:
    """transformers' own config of these options. Raises what its class does on options that make no sense to it.

    Relied on: `AutoQuantizationConfig.from_dict`, which may change the dictionary (4.48).
    """
    return AutoQuantizationConfig.from_dict(deepcopy(dict(options)))


def quantised(options: Mapping[str, Any], packed: bool, dtype: torch.dtype, build: Build) -> PreTrainedModel:
    """A model on the meta device with the layers that loading it gives; `build` makes it with ordinary ones, in a dtype.

    `packed` is whether the files are packed already. Raises what the quantiser does where it cannot be had here: a device or a
    package that is missing, layers that do not fit.

    Relied on: what `PreTrainedModel.from_pretrained` calls, in its order (5.1): `validate_environment`, `update_dtype`,
    `preprocess_model`, and for each name that `param_needs_quantization` the operation of `get_quantize_ops`.
    """
    config = config_of(options)
    method = str(getattr(config.quant_method, "value", config.quant_method))
    as_files = packed and method not in _PACKED_ALIKE
    quantiser = AutoHfQuantizer.from_config(config, pre_quantized=as_files)
    placed = {"": _device()}
    quantiser.validate_environment(device_map=dict(placed), weights_only=True)
    dtype = quantiser.update_dtype(dtype)
    model = build(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            quantiser.preprocess_model(
                model=model, dtype=dtype, device_map=placed, checkpoint_files=None, use_kernels=False
            )
    finally:
        torch.set_default_dtype(before)
    if not as_files:
        _pack(model, quantiser, dtype)
    return model


def _device() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def _pack(model: PreTrainedModel, quantiser: HfQuantizer, dtype: torch.dtype) -> None:
    """Do to each weight what loading does to it."""
    for name in [name for name, _ in model.named_parameters() if quantiser.param_needs_quantization(model, name)]:
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        kept = module.get_parameter(own)
        value = torch.empty(kept.shape, dtype=kept.dtype if kept.is_floating_point() else dtype, device="meta")
        if not _pack_for_bitsandbytes(module, value):
            made = quantiser.get_quantize_ops().convert(
                {name: [value]}, model=model, full_layer_name=name, missing_keys=set()
            )
            for key, tensor in made.items():
                _put(model, key, tensor[0] if isinstance(tensor, list) else tensor)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._buffers:
        module._buffers[own] = tensor
    else:
        module._parameters[own] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )


def _pack_for_bitsandbytes(module: nn.Module, value: Tensor) -> bool:
    """Pack the weight of one of bitsandbytes' layers, which it does only when a weight leaves or enters a real device.

    Relied on: `Params4bit._quantize(device)`, whose operators have shapes for the meta device, and what an `Int8Params` holds:
    whole numbers of the same shape, and a scale for each row, as `SCB`. The table that scales are quantised by is made once a
    process, on the device of the first tensor, which must not be this one (0.45).
    """
    kind = type(module._parameters.get("weight")).__name__
    if kind not in ("Params4bit", "Int8Params"):
        return False
    package: Any = import_module("bitsandbytes")
    layers = package.nn
    old = vars(module.weight)
    if kind == "Params4bit":
        if "dynamic" not in package.functional.name2qmap:
            package.functional.quantize_blockwise(torch.zeros(1))
        made = layers.Params4bit(value, requires_grad=False, **old)
        made._quantize(value.device)
    elif old["has_fp16_weights"]:
        made = layers.Int8Params(value, requires_grad=False, has_fp16_weights=True)
    else:
        whole = torch.empty_like(value, dtype=torch.int8)
        scales = torch.empty_like(value[:, 0], dtype=torch.float32)
        made = layers.Int8Params(whole, requires_grad=False, CB=whole, SCB=scales)
    module._parameters["weight"] = made
    return True
