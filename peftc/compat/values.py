"""Constants of the reference that other libraries read, and its mappings by type, made from the registry when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from peftc.compiler.match import ALL_LINEAR
from peftc.config.base import CONFIG_NAME as CONFIG_NAME
from peftc.config.types import PeftType, TaskType
from peftc.registry.manager import default_registry
from peftc.tuner.method import TunerMethod

#: the pickle that old adapters are in; peftc does not read it
WEIGHTS_NAME: Final = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME: Final = "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME: Final = "tokenizer_config.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND: Final = ALL_LINEAR
EMBEDDING_LAYER_NAMES: Final = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES: Final = ["score", "classifier"]
DUMMY_TARGET_MODULES: Final = "dummy-target-modules"
DUMMY_MODEL_CONFIG: Final = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION: Final = 20
#: floating-point types that adapters compute with
_COMPUTE = ("float16", "bfloat16", "float32")
#: floating-point types that adapters are cast up from
UPCAST_DTYPES: Final = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
#: caches of older versions of transformers were converted by these
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: Final[Mapping[str, Any]] = {}

_TASK_MODELS = {
    TaskType.SEQ_CLS: "PeftModelForSequenceClassification",
    TaskType.SEQ_2_SEQ_LM: "PeftModelForSeq2SeqLM",
    TaskType.CAUSAL_LM: "PeftModelForCausalLM",
    TaskType.TOKEN_CLS: "PeftModelForTokenClassification",
    TaskType.QUESTION_ANS: "PeftModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "PeftModelForFeatureExtraction",
}


def _compute_dtypes() -> tuple[Any, ...]:
    import torch  # below the torch line

    return tuple(getattr(torch, name) for name in _COMPUTE)


def _of_methods(value: Callable[[TunerMethod], Any], prompts: bool = True) -> Mapping[PeftType, Any]:
    methods = [default_registry().get(name) for name in default_registry().names]
    return MappingProxyType({PeftType(m.peft_type): value(m) for m in methods if prompts or not m.is_prompt})


def _configs() -> Mapping[PeftType, Any]:
    return _of_methods(lambda method: method.config)


def _prefixes() -> Mapping[PeftType, Any]:
    return _of_methods(lambda method: method.prefix, prompts=False)


def _tuners() -> Mapping[PeftType, Any]:
    from peftc.runtime.classes import model_class  # below the torch line

    return _of_methods(model_class, prompts=False)


def _task_models() -> Mapping[str, Any]:
    peftc = importlib.import_module("peftc")
    return MappingProxyType({str(task): getattr(peftc, name) for task, name in _TASK_MODELS.items()})


#: made when they are asked for: they need torch, or load plugins
_MADE: Mapping[str, Callable[[], Any]] = {
    "ALLOWED_COMPUTE_DTYPES": _compute_dtypes,
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": _task_models,
    "PEFT_TYPE_TO_CONFIG_MAPPING": _configs,
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": _tuners,
    "PEFT_TYPE_TO_PREFIX_MAPPING": _prefixes,
    "PEFT_TYPE_TO_TUNER_MAPPING": _tuners,
}


def __getattr__(name: str) -> Any:
    if name in _MADE:
        return _MADE[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
