"""Functions on models of any class that have adapters, under the reference's names (`peft.functional`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.model.functions.assistance import delete_adapter, set_adapter, set_requires_grad
    from peftc.model.functions.precision import cast_adapter_dtype
    from peftc.model.functions.state import get_peft_model_state_dict, set_peft_model_state_dict
    from peftc.model.mapping import inject_adapter_in_model

#: where each function lives; imported when it is first used
_HOMES = {
    "cast_adapter_dtype": "peftc.model.functions.precision",
    "delete_adapter": "peftc.model.functions.assistance",
    "get_peft_model_state_dict": "peftc.model.functions.state",
    "inject_adapter_in_model": "peftc.model.mapping",
    "set_adapter": "peftc.model.functions.assistance",
    "set_peft_model_state_dict": "peftc.model.functions.state",
    "set_requires_grad": "peftc.model.functions.assistance",
}

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(importlib.import_module(_HOMES[name]), name)
