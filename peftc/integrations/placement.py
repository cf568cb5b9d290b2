"""Where tensors are: devices, the meta device, and parameters that DeepSpeed keeps elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def infer_device() -> str:
    """The kind of accelerator that torch finds, `"cpu"` without one."""
    return accelerator.type if (accelerator := torch.accelerator.current_accelerator(check_available=True)) else "cpu"


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers was told to shard parameters with DeepSpeed."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> AbstractContextManager[Any]:
    """Within the block, parameters that DeepSpeed shards are whole. Without it, nothing happens."""
    if not check_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module)


def init_empty_weights(include_buffers: bool | None = None) -> AbstractContextManager[Any]:
    """Within the block, parameters of new modules are on the meta device, and buffers if asked for."""
    from accelerate import init_empty_weights as of_accelerate  # type: ignore[import-untyped]

    return of_accelerate(include_buffers=bool(include_buffers))


def accelerators() -> list[str]:
    """Each accelerator that torch finds: its kind, and its name where torch knows one, such as `cuda: NVIDIA H100`."""
    kind = infer_device()
    if kind == "cpu":
        return []
    name_of = getattr(torch.get_device_module(kind), "get_device_name", None)  # MPS has none
    count = torch.accelerator.device_count()
    return [f"{kind}: {name_of(index)}" if name_of is not None else kind for index in range(count)]
