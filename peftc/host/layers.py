"""transformers' own layers and models, told apart without importing the library: an instance cannot exist before it is loaded."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, cast

from torch import nn


class _Nothing:
    """A class that nothing is an instance of."""


#: Linear subclasses known to compute `W x + b` although they have a forward of their own, by qualified name (Falcon, 4.0).
_PLAIN_LINEAR = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


def loaded_class(module: str, name: str) -> type:
    """A class of a module of transformers, if that is loaded; else one that nothing is an instance of."""
    loaded: ModuleType | None = sys.modules.get(f"transformers.{module}")
    return _Nothing if loaded is None else cast(type, getattr(loaded, name, _Nothing))


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a model of transformers. Relied on: `modeling_utils.PreTrainedModel` (4.0)."""
    return isinstance(model, loaded_class("modeling_utils", "PreTrainedModel"))


def is_transposed_linear(cls: type) -> bool:
    """Whether a class is a linear map with its weight as (in, out). Relied on: `pytorch_utils.Conv1D` (4.18)."""
    return issubclass(cls, loaded_class("pytorch_utils", "Conv1D"))


def is_plain_linear(cls: type) -> bool:
    """Whether a subclass of a linear layer with a forward of its own computes what a linear layer does."""
    return f"{cls.__module__}.{cls.__qualname__}" in _PLAIN_LINEAR


def is_scaled_embedding(cls: type) -> bool:
    """Whether a class is an embedding that multiplies its output by `embed_scale`.

    Relied on: transformers ends the names of such classes, one in each model's file, with `ScaledWordEmbedding` (4.40).
    """
    return issubclass(cls, nn.Embedding) and cls.__name__.endswith("ScaledWordEmbedding")


def embedding_scale(embedding: nn.Module) -> Any:
    """What an embedding's output is multiplied by; None for a plain one. Relied on: the attribute `embed_scale` (4.40)."""
    return getattr(embedding, "embed_scale", None)


def stores_transposed(module: nn.Module) -> bool:
    """Whether a module stores the weights of experts as (experts, in, out). Relied on: its attribute `is_transposed` (5.0)."""
    return getattr(module, "is_transposed", False) is True


def recomputes(model: nn.Module) -> bool:
    """Whether any module recomputes its activations in backward. Relied on: the flag `gradient_checkpointing` of each
    module that can (4.0; other names of it in newer releases set the same flag)."""
    return any(vars(module).get("gradient_checkpointing", False) for module in model.modules())
