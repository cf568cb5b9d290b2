"""Conveniences under the reference's names (`peft.helpers`); each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.model.functions.assistance import (
        check_if_peft_model,
        disable_input_dtype_casting,
        rescale_adapter_scale,
        row_values,
        take_step,
        update_forward_signature,
        update_generate_signature,
        update_signature,
    )

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "row_values",
    "take_step",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(importlib.import_module("peftc.model.functions.assistance"), name)
