"""Weights that a quantisation library stores in a form of its own: finding the config, and opening the weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftc.runtime.bases.storages import storage_of

#: bitsandbytes' parameter classes, by name: looking must not import it
_BNB: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The model's quantisation config if it was quantised by that method, else None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """How bitsandbytes stores the parameter, or False."""
    return _BNB.get(type(param).__name__, False)


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """A layer's weight in floating point, `(out, in)`; one that is not quantised as it is.

    Raises `TypeError` if the weight is no tensor.
    """
    storage = storage_of(module)
    if storage is not None:
        return storage.open(module)
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"The weight is a {type(weight).__name__}, not a tensor")
    if not isinstance(weight, nn.Parameter) or not get_bnb_param_type(weight):
        return weight
    return dequantize_bnb_weight(weight, getattr(module, "state", None))


def dequantize_bnb_weight(weight: Any, state: Any = None) -> Tensor:
    """A weight of bitsandbytes in floating point, on its own device. `state` belongs to 8-bit layers.

    Raises `ValueError` for an 8-bit weight without a state.
    """
    import bitsandbytes  # type: ignore[import-not-found]

    if get_bnb_param_type(weight) == "4bit":
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if state is None:
        raise ValueError("An 8-bit weight needs the `state` of its layer")
    scale = weight.SCB if state.SCB is None else state.SCB
    # rows were scaled so that the largest entry is 127
    return weight.data.to(torch.float32) * (scale.to(weight.device) / 127).view(-1, 1)
