"""Adapters as plain dictionaries of tensors, with the keys that a checkpoint has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftc.model.peft_model import DEFAULT, PeftModel


def get_peft_model_state_dict(model: PeftModel, adapter_name: str = DEFAULT, **kwargs: Any) -> dict[str, Tensor]:
    """What a checkpoint of the adapter holds: key on disk -> tensor."""
    return model.adapter_tensors(adapter_name)
