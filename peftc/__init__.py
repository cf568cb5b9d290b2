"""Public names of peftc, each imported when it is first used, so that `import peftc` is nearly free.

Names of methods (configs, empty model and layer classes) are not listed anywhere: the registry is asked, and only the
plugin that declares the name is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from peftc._version import VERSION as __version__

if TYPE_CHECKING:
    from peftc.checkpoint.weights import load_peft_weights
    from peftc.compiler.compile import compile_plan
    from peftc.config.spec import load_spec
    from peftc.diagnostics import NoMatchingPeftModuleError, PeftcError, PeftcWarning, PeftError, PeftWarning
    from peftc.integrations.transformers.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from peftc.model.functions.base_state import get_base_model_state_dict, set_base_model_state_dict
    from peftc.model.functions.conversion import convert_adapter
    from peftc.model.functions.hotswap import (
        check_hotswap_configs_compatible,
        hotswap_adapter,
        hotswap_adapter_from_state_dict,
        prepare_model_for_compiled_hotswap,
    )
    from peftc.model.functions.intruders import reduce_intruders
    from peftc.model.functions.optimizers import preconditioned_optimizer, projected_optimizer, two_rate_optimizer
    from peftc.model.functions.precision import cast_mixed_precision_params, prepare_model_for_kbit_training
    from peftc.model.functions.sequences import (
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
        bloom_model_postprocess_past_key_value,
        shift_tokens_right,
    )
    from peftc.model.functions.state import get_peft_model_state_dict, set_peft_model_state_dict
    from peftc.model.functions.tables import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peftc.model.mapping import get_peft_config, get_peft_model, inject_adapter_in_model
    from peftc.model.mixed import PeftMixedModel
    from peftc.model.parts.status import get_layer_status, get_model_status
    from peftc.model.peft_model import PeftModel
    from peftc.model.tasks import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from peftc.plugin import PeftConfig, PeftConfigMixin, PeftType, PromptLearningConfig, TaskType
    from peftc.runtime.applying.dequantizing import dequantize as dequantize

    __all__ = [
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
        "NoMatchingPeftModuleError",
        "PeftConfig",
        "PeftConfigMixin",
        "PeftError",
        "PeftMixedModel",
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "PeftType",
        "PeftWarning",
        "PeftcError",
        "PeftcWarning",
        "PromptLearningConfig",
        "TaskType",
        "__version__",
        "bloom_model_postprocess_past_key_value",
        "cast_mixed_precision_params",
        "check_hotswap_configs_compatible",
        "compile_plan",
        "convert_adapter",
        "dequantize",
        "get_base_model_state_dict",
        "get_layer_status",
        "get_model_status",
        "get_peft_config",
        "get_peft_model",
        "get_peft_model_state_dict",
        "hotswap_adapter",
        "hotswap_adapter_from_state_dict",
        "inject_adapter_in_model",
        "load_peft_weights",
        "load_spec",
        "preconditioned_optimizer",
        "prepare_model_for_compiled_hotswap",
        "prepare_model_for_kbit_training",
        "projected_optimizer",
        "reduce_intruders",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
        "shift_tokens_right",
        "two_rate_optimizer",
    ]

#: where each fixed public name lives
_HOMES = {
    "AutoPeftModel": "peftc.integrations.transformers.auto",
    "AutoPeftModelForCausalLM": "peftc.integrations.transformers.auto",
    "AutoPeftModelForFeatureExtraction": "peftc.integrations.transformers.auto",
    "AutoPeftModelForQuestionAnswering": "peftc.integrations.transformers.auto",
    "AutoPeftModelForSeq2SeqLM": "peftc.integrations.transformers.auto",
    "AutoPeftModelForSequenceClassification": "peftc.integrations.transformers.auto",
    "AutoPeftModelForTokenClassification": "peftc.integrations.transformers.auto",
    "bloom_model_postprocess_past_key_value": "peftc.model.functions.sequences",
    "cast_mixed_precision_params": "peftc.model.functions.precision",
    "check_hotswap_configs_compatible": "peftc.model.functions.hotswap",
    "compile_plan": "peftc.compiler.compile",
    "convert_adapter": "peftc.model.functions.conversion",
    "dequantize": "peftc.runtime.applying.dequantizing",
    "get_base_model_state_dict": "peftc.model.functions.base_state",
    "get_peft_config": "peftc.model.mapping",
    "get_peft_model": "peftc.model.mapping",
    "get_peft_model_state_dict": "peftc.model.functions.state",
    "hotswap_adapter": "peftc.model.functions.hotswap",
    "hotswap_adapter_from_state_dict": "peftc.model.functions.hotswap",
    "get_layer_status": "peftc.model.parts.status",
    "get_model_status": "peftc.model.parts.status",
    "inject_adapter_in_model": "peftc.model.mapping",
    "load_peft_weights": "peftc.checkpoint.weights",
    "load_spec": "peftc.config.spec",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "peftc.model.tasks",
    "NoMatchingPeftModuleError": "peftc.diagnostics",
    "PEFT_TYPE_TO_CONFIG_MAPPING": "peftc.model.functions.tables",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "peftc.model.functions.tables",
    "PEFT_TYPE_TO_PREFIX_MAPPING": "peftc.model.functions.tables",
    "PEFT_TYPE_TO_TUNER_MAPPING": "peftc.model.functions.tables",
    "PeftcError": "peftc.diagnostics",
    "PeftConfig": "peftc.plugin",
    "PeftConfigMixin": "peftc.plugin",
    "PeftcWarning": "peftc.diagnostics",
    "PeftError": "peftc.diagnostics",
    "PeftMixedModel": "peftc.model.mixed",
    "PeftModel": "peftc.model.peft_model",
    "PeftModelForCausalLM": "peftc.model.tasks",
    "PeftModelForFeatureExtraction": "peftc.model.tasks",
    "PeftModelForQuestionAnswering": "peftc.model.tasks",
    "PeftModelForSeq2SeqLM": "peftc.model.tasks",
    "PeftModelForSequenceClassification": "peftc.model.tasks",
    "PeftModelForTokenClassification": "peftc.model.tasks",
    "PeftType": "peftc.plugin",
    "PeftWarning": "peftc.diagnostics",
    "prepare_model_for_compiled_hotswap": "peftc.model.functions.hotswap",
    "prepare_model_for_kbit_training": "peftc.model.functions.precision",
    "preconditioned_optimizer": "peftc.model.functions.optimizers",
    "projected_optimizer": "peftc.model.functions.optimizers",
    "PromptLearningConfig": "peftc.plugin",
    "reduce_intruders": "peftc.model.functions.intruders",
    "set_base_model_state_dict": "peftc.model.functions.base_state",
    "set_peft_model_state_dict": "peftc.model.functions.state",
    "shift_tokens_right": "peftc.model.functions.sequences",
    "TaskType": "peftc.plugin",
    "two_rate_optimizer": "peftc.model.functions.optimizers",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "peftc.model.functions.sequences",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _everything()
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is not None:
        # `from peftc import rules` asks here first; Python then imports the submodule
        raise AttributeError(f"module `peftc` has no attribute `{name}`", name=name, obj=sys.modules[__name__])
    else:
        return _name_of_a_method(name)
    globals()[name] = value
    return value


def _name_of_a_method(name: str) -> Any:
    """What an installed method declares under this name, such as its config class. Raises `AttributeError`, and
    `MissingNameError` if the name's own plugin cannot be loaded."""
    from peftc.diagnostics import MissingNameError, did_you_mean
    from peftc.registry.manager import default_registry

    registry = default_registry()
    found = registry.find_name(name)
    if found is None:
        reason = registry.reason_missing(name)
        if reason is not None:  # not an `AttributeError`: `from peftc import …` would leave its text out
            raise MissingNameError(reason.diagnostics) from reason
        hint = did_you_mean(name, [*_HOMES, *registry.public_names()])
        broken = "".join(f"\nIt may be of a plugin that cannot be used: {told.what}." for told in registry.out_of_order)
        raise AttributeError(
            f"Neither peftc nor an installed method has the public name `{name}`. {hint}".rstrip() + broken
        )
    method, role = found
    value = _of_method(method, role, name)
    if registry.claims_for(method.peft_type):  # one that is only registered may be exchanged for another
        globals()[name] = value
    return value


def _of_method(method: Any, role: str, name: str) -> Any:
    if role == "config":
        return method.config
    if role == "export":
        return method.exports[name]
    from peftc.runtime.applying.classes import CLASSES

    return CLASSES[role](method)


def _everything() -> list[str]:
    """What `from peftc import *` imports: the fixed names, and those of every method that can be loaded."""
    from peftc.registry.manager import default_registry

    of_methods = (name for method in default_registry().load_all() for name in method.public_names)
    return sorted(["__version__", *_HOMES, *of_methods])


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
