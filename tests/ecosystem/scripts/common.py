"""What the scripts share: tensors that both libraries start from, and what they record of a model."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def drawn(name: str, shape: torch.Size | tuple[int, ...], scale: float = 0.1) -> Tensor:
    """The same numbers for the same name in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return scale * torch.randn(tuple(shape), generator=generator)


def fill(model: nn.Module, salt: str = "") -> None:
    """Give every trainable parameter the numbers that belong to its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(drawn(salt + name, parameter.shape))


def redrawn(folder: str | Path, salt: str = "") -> None:
    """Overwrite the tensors of a saved adapter, so that both libraries go on from the same file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    (file,) = Path(folder).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata, found = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file({key: drawn(salt + key, t.shape).to(t.dtype) for key, t in found.items()}, file, metadata)


def parameters(model: nn.Module) -> dict[str, Any]:
    """Names, types and trainability: part of the interface, since other libraries go by them."""
    return {name: [str(p.dtype), list(p.shape), p.requires_grad] for name, p in model.named_parameters()}


def sums(model: nn.Module) -> dict[str, float]:
    """A number for each trained tensor."""
    return {name: p.double().abs().sum().item() for name, p in model.named_parameters() if p.requires_grad}


def write(results: dict[str, Any], name: str = "results.json") -> None:
    """Leave the results in the working folder."""
    Path(name).write_text(json.dumps(results, indent=1), encoding="utf-8")
