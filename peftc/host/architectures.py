"""Which model classes transformers has for a config, by its own tables, and what they build of one."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: What configs and models raise of values that do not go together.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def known_types() -> Collection[str]:
    """Every model type that has a config class. Relied on: `CONFIG_MAPPING` holds them all (4.0)."""
    found: Collection[str] = CONFIG_MAPPING
    return found


def auto_classes() -> list[str]:
    """Names of the automatic model classes. Relied on: they begin with `AutoModel` (4.0)."""
    return [name for name in dir(transformers) if name.startswith("AutoModel")]


def classes_in(auto: str, config: PretrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """Classes that an automatic class has for a config; several where the config's `architectures` chooses.

    Relied on: the table `_model_mapping` of every automatic class, from config class to one model class or several (4.0).
    """
    found = getattr(transformers, auto)._model_mapping.get(type(config), ())
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def as_configured(model: nn.Module) -> PreTrainedModel | None:
    """A model as its config describes it, as it would be when it is loaded again, on the meta device; None if it is none of
    transformers', or quantised, so that its layers are not the config's own.

    Relied on: `_from_config` of every model class (4.0), and configs that are made of what they write. Raises `ValueError`
    where the config has values that do not go together.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "quantization_config", None) is not None:
        return None
    try:
        config = type(model.config).from_dict(copy.deepcopy(model.config.to_dict()))
        with torch.device("meta"):
            made: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    except _FAILURES as error:
        raise ValueError(str(error)) from error
    return made
