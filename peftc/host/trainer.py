"""transformers' `Trainer`, of which a subclass saves adapters: which of its functions are replaced, and its options by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn
from transformers import TrainingArguments

#: Functions of `Trainer` that a subclass replaces, with their parameters (5.0).
REPLACED: Final = {
    "_get_output_dir": ("trial",),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
}

#: The option for recomputing activations; older releases have only `gradient_checkpointing`, which newer ones deprecate.
RECOMPUTE: Final = min(
    {"activation_checkpointing", "gradient_checkpointing"} & TrainingArguments.__dataclass_fields__.keys()
)


def use_one_device(arguments: TrainingArguments) -> None:
    """Keep a model off `DataParallel`, which copies it at every step. Relied on: `_n_gpu`, once `n_gpu` was read (4.0)."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


@contextmanager
def adapted_model(model: nn.Module) -> Iterator[None]:
    """Within, a `Trainer` is made for a model on a quantised base, whose adapters it does not know.

    Relied on: it refuses a quantised model that is no `peft.PeftModel` unless this attribute is set, which it asks then alone
    (`validate_quantization_for_training`, 5.0).
    """
    vars(model)["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del vars(model)["_hf_peft_config_loaded"]


def takes_loss_keywords(base: nn.Module) -> bool:
    """Whether a model wants to know by how many tokens of all accumulated batches its loss is to be divided.

    Relied on: the attribute `accepts_loss_kwargs`, and that without it a `forward` with `**kwargs` does (4.46).
    """
    said: Any = getattr(base, "accepts_loss_kwargs", None)
    if said is not None:
        return bool(said)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values())
