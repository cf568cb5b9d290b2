"""Which model classes transformers has for a config, by its own tables."""

from __future__ import annotations

from collections.abc import Collection

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


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
