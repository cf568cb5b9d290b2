"""From an adapter alone to the adapted model: its config names the base model and the task, and both are loaded.

A class that a config names is looked up among the public names of known libraries. Nothing is imported because a file
says so; a caller may allow further modules.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import AutoTokenizer

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.config.files import read_config
from peftc.config.hub import optional_file
from peftc.config.sections import section_of_word
from peftc.config.types import TaskType
from peftc.diagnostics import PeftcError, Where
from peftc.graph.base_ref import BaseRef
from peftc.integrations.transformers.architecture import AUTO_CLASSES, FAILURES, told
from peftc.integrations.transformers.base import load_base
from peftc.model.parts.adapted import DEFAULT
from peftc.model.peft_model import PeftModel
from peftc.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peftc.registry.boundary import is_out_of_memory

#: libraries whose public model classes a config may name
_LIBRARIES = ("transformers", "diffusers")
_TOKENIZER_CONFIG = "tokenizer_config.json"
#: keywords that say where the adapter lies or how it is put on, which mean nothing to the base model
_ABOUT_THE_ADAPTER = frozenset(
    {"subfolder", "key_mapping", "ephemeral_gpu_offload", "autocast_adapter_dtype", "torch_device"}
)


class AutoPeftModel:
    """Loads an adapter together with the base model that it names. Not to be instantiated."""

    #: the task that is loaded; None takes the adapter's
    task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        what = f"`{name}` has no instances: the model's class follows from its config"
        raise PeftcError(rules.AUTO_CLASS(what, fix=f"Use `{name}.from_pretrained(folder)`."))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model, its embeddings enlarged to the adapter's tokenizer if it brings one, and the adapter on it.

        `revision` is the adapter's. Further keywords go to the base model (`dtype`, `device_map`, …) and the hub
        (`token`, …). `import_allowlist` names further modules from which the base model's class may be taken. Raises
        `PeftcError` if the adapter is for another task, or does not say what its base model is.
        """
        path = str(pretrained_model_name_or_path)
        described = config or read_config(path, revision=revision, **kwargs)
        task = cls._task(described, path)
        name = described.base_model_name_or_path
        if not name:
            fix = "Load the base model yourself and use `PeftModel.from_pretrained(model, folder)`."
            raise PeftcError(
                rules.AUTO_CLASS("The adapter does not name its base model", fix=fix, where=Where(file=path))
            )
        allowed = () if import_allowlist is None else import_allowlist
        options = {key: value for key, value in kwargs.items() if key not in _ABOUT_THE_ADAPTER}
        model = _base_model(name, described, task, allowed, options)
        _enlarge(model, path, revision, kwargs)
        wrapper = PeftModel if task is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
        return wrapper.from_pretrained(
            model, path, adapter_name, is_trainable=is_trainable, config=config, revision=revision, **kwargs
        )

    @classmethod
    def _task(cls, config: PeftConfig, path: str) -> TaskType | None:
        if cls.task is not None and config.task_type not in (None, cls.task):
            right = f"AutoPeftModelFor{_suffix(config.task_type)}"
            what = f"The adapter is for {config.task_type}, `{cls.__name__}` for {cls.task}"
            raise PeftcError(rules.AUTO_CLASS(what, fix=f"Use `{right}`.", where=Where(file=path)))
        return cls.task or config.task_type


def _suffix(task: TaskType | None) -> str:
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[str(task)].__name__.removeprefix("PeftModelFor")


def _base_model(
    name: str, config: PeftConfig, task: TaskType | None, allowed: Sequence[str], options: Mapping[str, Any]
) -> nn.Module:
    section = section_of_word(name)
    if "distribution" in section:  # a name of ours, which transformers does not know
        return load_base(BaseRef(**section, task_type=task, dtype=_dtype_name(options)))[0]
    cls = _named_class(config, allowed) if task is None else getattr(transformers, AUTO_CLASSES[task])
    if cls.__module__.partition(".")[0] == transformers.__name__:  # which asks on stdin where nothing is said
        options = {"trust_remote_code": False, **options}
    try:
        model: nn.Module = cls.from_pretrained(name, revision=config.revision or "main", **options)
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        fix = "Name a base model that can be reached: load it yourself and use `PeftModel.from_pretrained(model, folder)`."
        raise PeftcError(rules.BASE_UNREADABLE(told(error), fix=fix, where=Where(file=name))) from error
    return model


def _dtype_name(options: Mapping[str, Any]) -> str | None:
    dtype = options.get("dtype", options.get("torch_dtype"))
    return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")


def _named_class(config: PeftConfig, allowed: Sequence[str]) -> Any:
    """The class that `auto_mapping` names, from a library that we know or the caller allows."""
    mapping = config.auto_mapping or {}
    name, library = str(mapping.get("base_model_class")), str(mapping.get("parent_library"))
    root = library.partition(".")[0]
    if root in _LIBRARIES and not name.startswith("_"):
        found = getattr(importlib.import_module(_LIBRARIES[_LIBRARIES.index(root)]), name, None)
    elif library in allowed or root in allowed:
        found = getattr(importlib.import_module(library), name, None)
    else:
        known = " and ".join(_LIBRARIES)
        what = f"The base model's class `{name}` is from `{library}`; only {known} are looked into unasked"
        if not mapping:
            what = "The adapter has no task type and does not name its base model's class"
        fix = f"Use the class of a task, such as `AutoPeftModelForCausalLM`, or pass `import_allowlist=['{root}']` if you trust it."
        raise PeftcError(rules.AUTO_CLASS(what, fix=fix))
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        fix = "Load the base model yourself and use `PeftModel.from_pretrained(model, folder)`."
        raise PeftcError(rules.AUTO_CLASS(f"`{library}` has no model class `{name}`", fix=fix))
    return found


def _enlarge(model: nn.Module, path: str, revision: str | None, options: Mapping[str, Any]) -> None:
    """Make room for the tokens that were added to the adapter's own tokenizer."""
    if not isinstance(model, transformers.PreTrainedModel) or optional_file(path, _TOKENIZER_CONFIG, options) is None:
        return
    trusted = bool(options.get("trust_remote_code", False))
    tokenizer = AutoTokenizer.from_pretrained(
        path, revision=revision or "main", token=options.get("token"), trust_remote_code=trusted
    )
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for language models."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for encoder-decoder language models."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for classifiers of sequences."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for classifiers of tokens."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for extractive question answering."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for models whose hidden states are wanted."""

    task = TaskType.FEATURE_EXTRACTION
