"""GGUF files: the config from the header, the weights dense, and no claim of being quantised afterwards.

transformers unpacks a GGUF file into ordinary float weights but goes on calling the model quantised, so that its own
`Trainer` and `save_pretrained` refuse it; that is taken back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftc import rules
from peftc.diagnostics import PeftcError, Where
from peftc.host import loading
from peftc.registry.boundary import is_out_of_memory

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
    try:
        with loading.bar_on_terminals_only():
            model: PreTrainedModel = cls.from_pretrained(
                str(path.parent), gguf_file=path.name, **loading.dense_options(), **options
            )
    except _DAMAGE as error:
        if is_out_of_memory(error):
            raise
        raise _damaged(path, error) from error
    loading.forget_quantization(model)
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


def require_reader() -> None:
    """Raise `PeftcError` unless the `gguf` package is installed."""
    if find_spec("gguf") is None:
        fix = "Install it: `pip install gguf`."
        raise PeftcError(rules.DEPENDENCY_MISSING("Reading a GGUF file needs the package `gguf`", fix=fix))


@contextmanager
def read_once() -> Iterator[None]:
    """While this lasts, a file's header is taken apart once. Raises `PeftcError` without the reader."""
    require_reader()
    with loading.gguf_read_once():
        yield


def _damaged(path: Path, error: Exception) -> PeftcError:
    what = f"transformers cannot read the file: {type(error).__name__}: {' '.join(str(error).split())}"[:500]
    fix = "Download it again, or use the model in safetensors form."
    return PeftcError(rules.BASE_UNREADABLE(what, fix=fix, where=Where(file=path.name)))
