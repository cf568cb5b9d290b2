"""From a located base to the model class for its task and the config to build it from. No weights, no network, no remote code.

The class comes from transformers' own tables: a name in a config file is compared with them and never imported.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from peftc import rules
from peftc.config.problems import shorten
from peftc.diagnostics import Diagnostic, PeftcError, Where, did_you_mean
from peftc.graph.base_ref import CONFIG_FILE
from peftc.graph.locate import LocatedBase, refuse_large
from peftc.host.architectures import auto_classes, classes_in, known_types

#: What transformers' constructors and loaders raise on a config or a file that makes no sense to them.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    UnpicklingError,
    ValueError,
)

#: Task type -> transformers' automatic class.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Architecture:
    """A model class and the config to build it from."""

    cls: type[PreTrainedModel]
    config: PretrainedConfig


def architecture_of(base: LocatedBase) -> Architecture:
    """What the base's config, and the task it is wanted for, come to. Raises `PeftcError`.

    A multimodal model's class for text alone is built from the text part of the config.
    """
    config = _config_of(base)
    cls = _class_of(base, config)
    if cls.config_class is not type(config) and cls.config_class is config.sub_configs.get("text_config"):
        whole, config = config, config.get_text_config()
        quantization = getattr(whole, "quantization_config", None)
        if quantization is not None:
            config.quantization_config = quantization
    return Architecture(cls, config)


def _config_of(base: LocatedBase) -> PretrainedConfig:
    if base.gguf is not None:
        from peftc.integrations.transformers import gguf  # here: it brings transformers' tokenizers, for no other base

        return gguf.read_config(base.gguf)
    data = dict(base.config or {})
    refuse_large(base)
    _require_known_type(base, data)
    try:
        with _alone_in_a_folder(data) as folder:  # so that transformers reads it with all its own corrections
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            config._name_or_path = (
                ""  # a folder that is gone at once says nothing, and parts of the model would show it
            )
            return config
    except FAILURES as error:
        fix = "Compare it with the config of a model that works; `peftc graph` tries it alone."
        raise PeftcError(rules.BASE_UNREADABLE(told(error), fix=fix, where=_where(base))) from error


def _class_of(base: LocatedBase, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that the task asks for, else the one that the config names. A GGUF file holds a language model."""
    task = base.ref.task_type or ("CAUSAL_LM" if base.gguf is not None else None)
    if task is None:
        return _named_class(base, config)
    found = classes_in(AUTO_CLASSES[task], config)
    if found:
        named = config.architectures or []
        return next((cls for cls in found if cls.__name__ in named), found[0])
    what = f"transformers has no {AUTO_CLASSES[task]} for the model type `{config.model_type}`"
    fix = f"Task types that it has a class for: {', '.join(_tasks_of(config)) or 'none; leave `task_type` out'}."
    raise PeftcError(rules.BASE_UNBUILDABLE(what, fix=fix, why="", where=_where(base)))


def _named_class(base: LocatedBase, config: PretrainedConfig) -> type[PreTrainedModel]:
    named = next(iter(config.architectures or []), None)
    if named is None:
        plain = classes_in(AutoModel.__name__, config)
        if plain:
            return plain[0]
    known: dict[str, type[PreTrainedModel]] = {}
    for auto in auto_classes():  # each brings files of transformers: no more of them than it takes
        known |= {cls.__name__: cls for cls in classes_in(auto, config)}
        if named in known:
            return known[named]
    what = f"transformers has no class `{named}`" if named else f"`{config.model_type}` has no model without a head"
    hint = did_you_mean(named, known) if named else ""
    fix = f"{hint} Give a `task_type`: {', '.join(_tasks_of(config))}.".strip()
    why = "The config decides the model class where no task does."
    raise PeftcError(rules.BASE_UNBUILDABLE(what, fix=fix, why=why, where=_where(base)))


def unbuildable(base: LocatedBase, error: Exception) -> Diagnostic:
    """The diagnostic for a model that transformers could not build or load."""
    if isinstance(error, ImportError):
        fix = "Install what the message names."
        return rules.DEPENDENCY_MISSING(told(error), fix=fix, where=_where(base))
    fix = "The same happens with transformers alone; correct the config or update transformers."
    return rules.BASE_UNBUILDABLE(told(error), fix=fix, where=_where(base))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks about a model that is only looked at off the terminal."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _require_known_type(base: LocatedBase, data: dict[str, Any]) -> None:
    kind = data.get("model_type")
    where = _where(base)
    named = data.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        what = f"`architectures` cannot be `{shorten(named)}`: should be a list of names"
        raise PeftcError(rules.BASE_UNREADABLE(what, fix="Name the model's class in a list.", where=where))
    if isinstance(kind, str) and kind in known_types():
        return
    if "auto_map" in data:
        what = f"The model type `{kind}` is defined by code in the model's own repository"
        fix = "Build the model yourself and use `peftc.get_peft_model` or `peftc graph` on a saved graph."
        raise PeftcError(rules.REMOTE_CODE(what, fix=fix, where=where))
    if kind is None:
        fix = "Add `model_type`, or name the folder that `save_pretrained` of transformers wrote."
        raise PeftcError(rules.BASE_UNREADABLE("The config has no `model_type`", fix=fix, where=where))
    fix = did_you_mean(str(kind), known_types()) or f"transformers {transformers.__version__} may be too old for it."
    raise PeftcError(
        rules.BASE_UNREADABLE(f"transformers does not know the model type `{shorten(kind)}`", fix=fix, where=where)
    )


@contextmanager
def _alone_in_a_folder(data: dict[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="peftc-") as folder:
        Path(folder, CONFIG_FILE).write_text(json.dumps(data), encoding="utf-8")
        yield folder


def _tasks_of(config: PretrainedConfig) -> list[str]:
    return [task for task, auto in AUTO_CLASSES.items() if classes_in(auto, config)]


def told(error: Exception) -> str:
    """The error in one line; transformers puts the reason of some into the lines after the first."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _where(base: LocatedBase) -> Where:
    return Where(file=base.ref.name)
