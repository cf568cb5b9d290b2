"""GGUF files: the config from the header, the weights dense, and no claim of being quantised afterwards.

transformers unpacks a GGUF file into ordinary float weights but goes on calling the model quantised, so that its own
`Trainer` and `save_pretrained` refuse it; `forget_quantization` takes that back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from peftc import rules
from peftc.diagnostics import PeftcError, Where

#: What a damaged or unknown file makes the readers raise: they index into bytes and look names up in tables.
_DAMAGE = (
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    struct.error,
    TypeError,
    ValueError,
)


def read_config(path: Path) -> PretrainedConfig:
    """The config in a GGUF file's header; no tensor is read. Raises `PeftcError`."""
    require_reader()
    try:
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def load_model(path: Path, cls: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    """The model with dense weights; `options` are those of `from_pretrained`. Raises `PeftcError`."""
    require_reader()
    dense = GgufConfig(dequantize=True)  # with the `kernels` package installed, transformers would keep them packed
    try:
        with _bar_on_terminals_only():
            model: PreTrainedModel = cls.from_pretrained(
                str(path.parent), gguf_file=path.name, quantization_config=dense, **options
            )
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    forget_quantization(model)
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the file contains. Raises `PeftcError`."""
    require_reader()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, trust_remote_code=False
        )
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return tokenizer


def forget_quantization(model: PreTrainedModel) -> None:
    """Let a model whose weights are dense say so."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)


def require_reader() -> None:
    """Raise `PeftcError` unless the `gguf` package is installed."""
    if find_spec("gguf") is None:
        fix = "Install it: `pip install gguf`."
        raise PeftcError(rules.DEPENDENCY_MISSING("Reading a GGUF file needs the package `gguf`", fix=fix))


@contextmanager
def read_once() -> Iterator[None]:
    """While this lasts, a file's header is taken apart once and not three times (for config, weights and tokenizer).

    It takes seconds each time, and so does the table of tensor names, which is made again for every module. Both are pure
    functions of their arguments: remembering them changes nothing else.
    """
    require_reader()
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


@contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """The unpacking loop's progress bar has no switch: `disable=None` draws it on terminals alone."""
    loader: Any = modeling_gguf_pytorch_utils
    shown = loader.tqdm
    loader.tqdm = partial(shown, disable=None)
    try:
        yield
    finally:
        loader.tqdm = shown


def _damaged(path: Path, error: Exception) -> PeftcError:
    what = f"transformers cannot read the file: {type(error).__name__}: {' '.join(str(error).split())}"[:500]
    fix = "Download it again, or use the model in safetensors form."
    return PeftcError(rules.BASE_UNREADABLE(what, fix=fix, where=Where(file=path.name)))
