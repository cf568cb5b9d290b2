"""What a model says of how transformers quantised it; nothing of transformers is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers has loaded the model with packed weights. Relied on: the attribute `hf_quantizer` (4.38)."""
    return getattr(model, "hf_quantizer", None) is not None


def quantization_said(model: nn.Module) -> dict[str, Any]:
    """How the model is quantised, as a `quantization_config` of JSON types that asks for it again; empty if it is not.

    Relied on: `model.config.quantization_config.to_diff_dict()`, which leaves out what is as usual (4.40).
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None or not is_quantised(model):
        return {}
    said: dict[str, Any] = _plain(config.to_diff_dict())
    method = str(getattr(config.quant_method, "value", config.quant_method))
    return {"quant_method": method, **{k: v for k, v in said.items() if k != "quant_method" and not k.startswith("_")}}


def is_saved_packed(model: nn.Module) -> bool:
    """Whether `save_pretrained` takes a quantised model. Relied on: `hf_quantizer.is_serializable()` (4.57)."""
    quantiser: Any = getattr(model, "hf_quantizer", None)
    return quantiser is None or bool(quantiser.is_serializable())


def _plain(value: Any) -> Any:
    """The value of JSON types; what is of no other is its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
