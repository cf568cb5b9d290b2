"""A base model with its real weights, and its tokenizer, wherever they come from.

Model class and dtype are chosen as for the graph, so that a plan made from the config fits the model loaded here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from peftc import rules
from peftc.checkpoint.load import AdapterFile
from peftc.diagnostics import PeftcError, Where
from peftc.graph.base_ref import BaseRef
from peftc.graph.locate import LocatedBase, locate
from peftc.graph.quantised import quantization_of
from peftc.integrations.transformers import gguf
from peftc.integrations.transformers.architecture import FAILURES, architecture_of, unbuildable
from peftc.integrations.transformers.dtypes import dtype_of
from peftc.integrations.transformers.quantising import loading_options
from peftc.registry.boundary import is_out_of_memory

#: A folder with one of these has a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load_base(
    base: BaseRef, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model in evaluation mode on `device`, and its tokenizer if it has one.

    A bare config gives a model initialised at random from `seed`, and no tokenizer. Raises `PeftcError` when something is
    missing or transformers cannot load it.
    """
    located = locate(base)
    with nullcontext() if located.gguf is None else gguf.read_once():
        model = _loaded_model(located, device) if located.has_weights else _random_model(located, seed)
        tokenizer = load_tokenizer(located)
    model.name_or_path = model.config._name_or_path = base.lasting_name or ""  # not where a distribution lies
    if quantization_of(located) is None:  # others are there, and some of them cannot be moved
        nn.Module.to(model, device)
    return model.eval(), tokenizer


def load_tokenizer(base: LocatedBase) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with the base, None if none does. Raises `PeftcError` if it cannot be read."""
    if base.gguf is not None:
        return gguf.load_tokenizer(base.gguf)
    if base.source is None:
        return None
    folder = Path(base.source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.source, revision=base.ref.revision or "main", trust_remote_code=False
        )
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise PeftcError(unbuildable(base, error)) from error
    return tokenizer


def _loaded_model(base: LocatedBase, device: torch.device | str) -> PreTrainedModel:
    found = architecture_of(base)
    options: dict[str, Any] = {"config": found.config, "dtype": dtype_of(base, found.config)}
    if torch.device(device).type != "cpu":
        options["device_map"] = {"": device}  # straight to the device, not through main memory
    options |= loading_options(base, device)
    with without_bars(where=not sys.stderr.isatty()):
        if base.gguf is not None:
            return gguf.load_model(base.gguf, found.cls, **options)
        try:
            model: PreTrainedModel = found.cls.from_pretrained(
                base.source, revision=base.ref.revision or "main", **options
            )
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
            raise PeftcError(unbuildable(base, error)) from error
    return model


def _random_model(base: LocatedBase, seed: int) -> PreTrainedModel:
    if quantization_of(base) is not None:
        what = "A bare config has no weights to quantise"
        fix = "Name a model with weights, or leave the quantisation out; planning does without weights."
        raise PeftcError(rules.QUANTIZER_REFUSES(what, fix=fix, where=Where(file=base.ref.name)))
    found = architecture_of(base)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = found.cls._from_config(found.config, dtype=dtype_of(base, found.config))
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise PeftcError(unbuildable(base, error)) from error
    return model


def fit_vocabulary(model: PreTrainedModel, file: AdapterFile) -> None:
    """Give the model's vocabulary the size that the embeddings in an adapter's file have, if it carries any."""
    try:
        embeddings: Any = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a model without a text input says so by raising
        return
    name = next((name for name, module in model.named_modules() if module is embeddings), None)
    ends = (f".{name}.weight", f".{name}.base_layer.weight")
    rows = next((facts.shape[0] for key, facts in file.tensors.items() if key.endswith(ends)), None)
    if name is not None and rows is not None and rows != embeddings.num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)  # what the new rows hold is loaded


@contextmanager
def without_bars(where: bool = True) -> Iterator[None]:
    """Where so wanted without transformers' own progress bars, which would be drawn across ours, or into a file."""
    shown = logging.is_progress_bar_enabled()
    if where:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
