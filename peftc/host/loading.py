"""How transformers loads weights: what it keeps in float32, and GGUF files, which it unpacks and goes on calling quantised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """A pattern that is searched for in names of parameters which loading in `dtype` leaves in float32; None if it leaves none.

    Relied on: `PreTrainedModel._get_dtype_plan(dtype)`, from patterns with `*` to dtypes (5.1).
    """
    kept = [name for name, wanted in model._get_dtype_plan(dtype).items() if wanted == torch.float32]
    return re.compile("|".join(name.replace("*", ".*") for name in kept)) if kept else None


def dense_options() -> dict[str, Any]:
    """Options of `from_pretrained` that unpack a GGUF file whatever is installed.

    Relied on: `GgufConfig(dequantize=True)`; with the package `kernels` installed, weights would stay packed without it.
    Releases before that class always unpack.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def forget_quantization(model: PreTrainedModel) -> None:
    """Let a model whose weights are dense say so. Relied on: what says otherwise are these attributes (5.0); conversions of packed
    files go too, and saving then looks for those of the model itself (5.1)."""
    said = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    for name in (*said, "_weight_conversions"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


@contextmanager
def bar_on_terminals_only() -> Iterator[None]:
    """Within, unpacking a GGUF file draws its progress bar on terminals alone.

    Relied on: the loop uses `tqdm` by its name in `modeling_gguf_pytorch_utils` (4.41); `disable=None` is tqdm's own word.
    """
    loader: Any = modeling_gguf_pytorch_utils
    shown = loader.tqdm
    loader.tqdm = partial(shown, disable=None)
    try:
        yield
    finally:
        loader.tqdm = shown


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within, a file's header is taken apart once and not three times (for config, weights and tokenizer).

    It takes seconds each time, and so does the table of tensor names, which is made again for every module. Relied on: both
    are looked up in the package `gguf` at each use, and are pure functions of their arguments (gguf 0.10).
    """
    package: Any = import_module("gguf")
    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(package, name) for name in names}
    for name, function in originals.items():
        setattr(package, name, cache(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(package, name, function)
