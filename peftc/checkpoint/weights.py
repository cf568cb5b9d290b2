"""Weights of an adapter as a dictionary of tensors on a device, for those who put them into a model themselves."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.checkpoint.keys import renamed
from peftc.checkpoint.load import load_adapter_tensors
from peftc.diagnostics import PeftcError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load_peft_weights(
    model_id: str | PathLike[str],
    device: str | torch.device | int | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """All tensors of an adapter in a folder or a repository of the hub, by checkpoint key, on a device.

    Without `device` they go to the machine's accelerator, if it has one. `key_mapping` see `renamed`;
    `hf_hub_download_kwargs` see `open_adapter`, `subfolder` among them. Only safetensors is read.

    Raises `PeftcError`: nothing there, a pickle, damaged, not readable, the hub not reachable, no such device.
    """
    place = device_of(device)
    tensors = load_adapter_tensors(fspath(model_id), **hf_hub_download_kwargs)
    if key_mapping:
        tensors = {new: tensors[key] for new, key in renamed(tensors, key_mapping).items()}
    return {key: tensor.to(place) for key, tensor in tensors.items()}


def device_of(device: str | torch.device | int | None) -> torch.device:
    """The device that is meant; the accelerator, or else the CPU, if none is. Raises `PeftcError` for an unknown one."""
    import torch

    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        what = f"`{device}` is no device: {str(error).splitlines()[0]}"
        raise PeftcError(rules.BAD_VALUE(what, fix="Use `cpu`, `cuda`, `cuda:0` and the like.")) from None
