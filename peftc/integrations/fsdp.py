"""How FSDP is to wrap an adapted model: whole blocks of the base, and each small trainable module by itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

from peftc.runtime.prompt.encoder import PromptModule

#: names of block classes, separated by commas; accelerate sets it from its own option
_VARIABLE = "FSDP_TRANSFORMER_CLS_TO_WRAP"


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., Any]:
    """A policy for `auto_wrap_policy` of FSDP. Trainable leaves are wrapped apart from frozen ones.

    Raises `TypeError` if the model has no module of a class that is to be wrapped.
    """
    blocks = getattr(model, "_no_split_modules", None) or ()
    names = [name for name in os.environ.get(_VARIABLE, ",".join(sorted(blocks))).split(",") if name]
    classes = {type(module).__name__: type(module) for module in model.modules()}
    missing = [name for name in names if name not in classes]
    if missing:
        raise TypeError(f"The model has no module of class {', '.join(missing)} to wrap")
    wrapped: set[type[nn.Module]] = {PromptModule, *(classes[name] for name in names)}
    leaves = partial(lambda_auto_wrap_policy, lambda_fn=_is_trainable_leaf)
    whole = partial(transformer_auto_wrap_policy, transformer_layer_cls=wrapped)
    return partial(_or_policy, policies=[leaves, whole])


def _is_trainable_leaf(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return not module._modules and weight is not None and weight.requires_grad
