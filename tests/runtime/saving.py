"""Models that are saved and loaded in tests of files, and what is read of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc import get_peft_model
from tests.runtime.methods import LANGUAGE_MODEL, narrow

FACTORS = ["q_proj", "v_proj"]
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
ROWS = 7


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def moved(model: nn.Module) -> nn.Module:
    """Every trainable tensor moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    return model


def language_model(folder: Path | None = None, tied: bool = False, resized: bool = False) -> Any:
    """A small one; `folder` gets the original, whatever is done afterwards."""
    model: Any = LANGUAGE_MODEL.build()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    if folder is not None:
        model.save_pretrained(folder)
        model.name_or_path = model.config._name_or_path = str(folder)
    if resized:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            model.resize_token_embeddings(model.config.vocab_size + ROWS, mean_resizing=False)
    return model


def wrapped(base: nn.Module, targets: list[str] = FACTORS, **options: Any) -> Any:
    return moved(get_peft_model(base, narrow(target_modules=targets, task_type="CAUSAL_LM", **options)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**LANGUAGE_MODEL.arguments()).logits
    return out


def tied(*targets: str, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: wrapped(language_model(tied=True), list(targets), **options)
