"""What the alias holds: which module of the reference has which name, and what of peftc that name is.

One table has the names that are not a method's; homes are imported when a name is asked for. A method's names, its
subpackage and its entries in the reference's mappings come from its record through the registry.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from peftc.compat.kinds import class_of, names_in, parts_of
from peftc.diagnostics import PeftcError
from peftc.optimizers import SUFFIX
from peftc.registry.manager import default_registry
from peftc.tuner.method import TunerMethod

#: (home in peftc, names there, modules of the reference that have them). `a=b` is the reference's `a`, our `b`.
#: The home `peftc` stands for its public names.
_ROWS: tuple[tuple[str, str, str], ...] = (
    (
        "peftc",
        "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification",
        "peft peft.peft_model",
    ),
    ("peftc", "get_layer_status get_model_status", "peft peft.peft_model"),
    ("peftc", "PeftMixedModel", "peft peft.mixed_model"),
    (
        "peftc",
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
        "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification",
        "peft peft.auto",
    ),
    ("peftc", "PeftConfig PromptLearningConfig", "peft peft.config"),
    ("peftc", "PeftConfigMixin", "peft.config"),
    ("peftc", "PeftType TaskType", "peft peft.utils peft.utils.peft_types"),
    ("peftc", "get_peft_model", "peft peft.mapping peft.mapping_func"),
    ("peftc", "inject_adapter_in_model", "peft peft.mapping peft.functional"),
    ("peftc", "get_peft_config", "peft peft.mapping"),
    (
        "peftc",
        "get_peft_model_state_dict set_peft_model_state_dict",
        "peft peft.peft_model peft.utils peft.utils.save_and_load peft.functional",
    ),
    ("peftc", "load_peft_weights", "peft peft.peft_model peft.utils peft.utils.save_and_load"),
    (
        "peftc",
        "get_base_model_state_dict set_base_model_state_dict",
        "peft peft.utils peft.utils.save_and_load",
    ),
    ("peftc", "prepare_model_for_kbit_training cast_mixed_precision_params", "peft peft.utils peft.utils.other"),
    (
        "peftc.functional",
        "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
        "peft.functional peft.tuners.tuners_utils",
    ),
    (
        "peftc.helpers",
        "check_if_peft_model disable_input_dtype_casting rescale_adapter_scale update_forward_signature "
        "update_generate_signature update_signature",
        "peft.helpers",
    ),
    ("peftc.runtime.layer.wrapper", "BaseTunerLayer", "peft.tuners.tuners_utils"),
    ("peftc.runtime.applying.tuner_model", "BaseTuner=TunerModel", "peft.tuners.tuners_utils"),
    (
        "peftc.runtime.around.saved_modules",
        "AuxiliaryTrainingWrapper ModulesToSaveWrapper",
        "peft.utils peft.utils.other",
    ),
    (
        "peftc",
        "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
        "prepare_model_for_compiled_hotswap",
        "peft.utils.hotswap",
    ),
    (
        "peftc.integrations.transformers.weight_conversion",
        "build_peft_weight_mapping get_model_conversion_mapping",
        "peft.utils.transformers_weight_conversion",
    ),
    ("peftc.integrations.fsdp", "fsdp_auto_wrap_policy", "peft.utils.other"),
    (
        "peftc.integrations.packages",
        "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available "
        "is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_te_available "
        "is_te_pytorch_available is_torch_tpu_available is_torchao_available is_xpu_available",
        "peft.import_utils",
    ),
    ("peftc.integrations.quantization", "get_quantization_config", "peft.utils peft.utils.other"),
    (
        "peftc.integrations.quantization",
        "dequantize_bnb_weight dequantize_module_weight get_bnb_param_type",
        "peft.utils.integrations",
    ),
    (
        "peftc.integrations.placement",
        "check_deepspeed_zero3_enabled gather_params_ctx init_empty_weights",
        "peft.utils.integrations",
    ),
    ("peftc.integrations.placement", "infer_device", "peft.utils peft.utils.other"),
    (
        "peftc.compat.helpers",
        "_freeze_adapter _get_batch_size _get_input_embeddings_name _get_submodules _is_valid_match id_tensor_storage "
        "transpose",
        "peft.utils peft.utils.other",
    ),
    ("peftc.compat.helpers", "get_pattern_key match_target_against_key str_to_bool", "peft.utils.other"),
    (
        "peftc.compat.helpers",
        "check_adapters_to_merge check_target_module_exists _maybe_include_all_linear_layers",
        "peft.tuners.tuners_utils",
    ),
    (
        "peftc.compat.structure",
        "_filter_state_dict_by_key_prefixes _find_minimal_target_modules _get_tuner_state_dict_key_prefixes "
        "_is_key_under_prefixes",
        "peft.tuners.tuners_utils",
    ),
    (
        "peftc.compat.structure",
        "_get_module_names_tied_with_embedding _get_no_split_modules",
        "peft.utils.other",
    ),
    ("peftc.runtime.slots.buffers", "BufferDict", "peft.tuners._buffer_dict"),
    (
        "peftc.compat.merging",
        "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning magnitude_prune prune "
        "random_pruning reshape_weight_task_tensors task_arithmetic ties",
        "peft.utils.merge_utils",
    ),
    (
        "peftc.compat.values",
        "CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
        "peft.utils peft.utils.constants peft.utils.other",
    ),
    (
        "peftc.compat.values",
        "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES",
        "peft.utils peft.utils.constants",
    ),
    (
        "peftc.compat.values",
        "DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES MIN_TARGET_MODULES_FOR_OPTIMIZATION "
        "SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME",
        "peft.utils.constants peft.utils.other",
    ),
    (
        "peftc",
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "peft peft.mapping",
    ),
    ("peftc", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "peft peft.auto peft.mapping_func"),
    ("peftc", "shift_tokens_right", "peft peft.utils peft.utils.other"),
    (
        "peftc",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value",
        "peft peft.utils peft.utils.constants peft.utils.other",
    ),
    ("peftc.compat", "__version__=VERSION", "peft"),
    ("peftc.config.base", "__version__=FILE_VERSION", "peft.config"),
    ("peftc", "NoMatchingPeftModuleError PeftError", "peft peft.utils peft.utils.error"),
    ("peftc", "PeftWarning", "peft peft.utils peft.utils.warning"),
)

#: modules of the reference that show every method's names
_WITH_METHODS = frozenset({"peft", "peft.tuners"})
_TUNERS = "peft.tuners"
#: modules that show functions of methods that make optimisers
_WITH_OPTIMIZERS = (
    "peft.optimizers",
    "peft.optimizers.lorafa",
    "peft.optimizers.loraplus",
    "peft.optimizers.riemannian",
)
#: modules that show functions of methods that give an adapter other tensors, and how their names begin
_WITH_REPLACING = ("peft.utils", "peft.utils.loftq_utils")
_REPLACING = "replace_"
#: submodules that a method's subpackage may be asked for; each shows the whole method
_PARTS = ("config", "layer", "model")
_TARGETS_MAPPING = re.compile(r"TRANSFORMERS_MODELS_TO_([A-Z0-9]+)_([A-Z]+_MODULES)_MAPPING")


@dataclass(frozen=True, slots=True)
class Home:
    """Where a name of the alias lives."""

    module: str
    name: str

    def owner(self) -> Any:
        """The module whose attribute it is. Raises `ImportError` if the home is not there."""
        module = importlib.import_module(self.module)
        homes: dict[str, str] = vars(module).get("_HOMES", {})
        return importlib.import_module(homes[self.name]) if self.name in homes else module


@cache
def table() -> dict[str, dict[str, Home]]:
    """Module of the reference -> name in it -> home in peftc; parents of modules are there, if empty."""
    found: dict[str, dict[str, Home]] = {
        "peft": {},
        _TUNERS: {},
        **{module: {} for module in (*_WITH_OPTIMIZERS, *_WITH_REPLACING)},
    }
    for home, names, modules in _ROWS:
        for module in modules.split():
            rows = found.setdefault(module, {})
            for name in names.split():
                there, _, here = name.partition("=")
                rows[there] = Home(home, here or there)
    return found


@cache
def subpackages() -> dict[str, str]:
    """Name of a method's subpackage in `peft.tuners` -> PEFT type. No plugin is loaded for it."""
    return {name.lower(): name for name in default_registry().names}


def method_of(module: str) -> TunerMethod | None:
    """The method whose subpackage, or a part of it, a module is. Raises `PeftcError` if its plugin is broken."""
    if not module.startswith(f"{_TUNERS}."):
        return None
    name, _, part = module.removeprefix(f"{_TUNERS}.").partition(".")
    peft_type = subpackages().get(name)
    known = ("", *_PARTS, *parts_of(name))
    return default_registry().get(peft_type) if peft_type is not None and part in known else None


def is_module(name: str) -> bool:
    """Whether the alias has a module of that name."""
    if name in table():
        return True
    try:
        return method_of(name) is not None
    except PeftcError:
        return False


def submodules(name: str) -> Iterator[str]:
    """Full names of the modules directly inside a module of the alias."""
    parents = [*table(), *(f"{_TUNERS}.{sub}" for sub in subpackages())]
    yield from sorted(n for n in parents if n.rpartition(".")[0] == name)
    if name.removeprefix(f"{_TUNERS}.") in subpackages():
        yield from (f"{name}.{part}" for part in sorted((*_PARTS, *parts_of(name.removeprefix(f"{_TUNERS}.")))))


def names_of(module: str) -> list[str]:
    """Every name that a module of the alias has, sorted. Loads the plugins whose names are in it."""
    names = set(table().get(module, {}))
    if module in _WITH_METHODS:
        names |= {n for m in default_registry().load_all() for n, role in m.public_names.items() if role != "layer"}
    if module in (*_WITH_OPTIMIZERS, *_WITH_REPLACING):
        names |= {name for m in default_registry().load_all() for name in m.exports if _shows(module, name)}
    method = method_of(module)
    if method is not None:
        names |= {*method.public_names, *([] if method.is_prompt else names_in(method.peft_type.lower()))}
    return sorted(names)


def of_a_method(module: str, name: str) -> Any:
    """What a name is that a method's record declares. Raises `KeyError` if none does."""
    own = method_of(module)
    if own is not None:
        return _of(own, name)
    if module in _WITH_METHODS or _shows(module, name):
        found = default_registry().find_name(name)
        if found is not None and found[1] != "layer":
            return _of(found[0], name)
    if module.startswith("peft.utils"):
        return _default_targets(name)
    raise KeyError(name)


def _shows(module: str, name: str) -> bool:
    """Whether a module beside those of methods shows a method's function of this name."""
    makes_optimizers = module in _WITH_OPTIMIZERS and name.endswith(SUFFIX)
    return makes_optimizers or (module in _WITH_REPLACING and name.startswith(_REPLACING))


def _of(method: TunerMethod, name: str) -> Any:
    from peftc.runtime.applying.classes import CLASSES
    from peftc.runtime.applying.layer_classes import layer_class  # below the torch line

    role = method.public_names.get(name)
    if role == "config":
        return method.config
    if role == "export":
        return method.exports[name]
    if role is not None:
        return CLASSES[role](method)
    if method.is_prompt:
        raise KeyError(name)
    layer: Any = layer_class(method)
    return class_of(layer, method.peft_type.lower(), name)


def _default_targets(name: str) -> dict[str, list[str] | str]:
    """The reference's table of default targets of a method, by its name there."""
    from peftc.graph.targets import default_targets, known_model_types

    match = _TARGETS_MAPPING.fullmatch(name)
    if match is None:
        raise KeyError(name)
    wanted, option = match[1], match[2].lower()
    for peft_type in default_registry().names:
        tables = default_registry().get(peft_type).default_targets
        if peft_type.replace("_", "") == wanted and option in tables:
            targets = {m: default_targets(tables[option], m) for m in known_model_types(tables[option])}
            return {model: found for model, found in targets.items() if found is not None}
    raise KeyError(name)
