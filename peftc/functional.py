"""Functions on models of any class that have adapters, under the reference's names (`peft.functional`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.model.assistance import delete_adapter, set_adapter, set_requires_grad
    from peftc.model.mapping import inject_adapter_in_model
    from peftc.model.precision import cast_adapter_dtype
    from peftc.model.state import get_peft_model_state_dict, set_peft_model_state_dict

#: where each function lives; imported when it is first used
_HOMES = {
    "cast_adapter_dtype": "peftc.model.precision",
    "delete_adapter": "peftc.model.assistance",
    "get_peft_model_state_dict": "peftc.model.state",
    "inject_adapter_in_model": "peftc.model.mapping",
    "set_adapter": "peftc.model.assistance",
    "set_peft_model_state_dict": "peftc.model.state",
    "set_requires_grad": "peftc.model.assistance",
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
