"""Options of the prompt methods, which add virtual tokens to the input instead of changing layers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from peftc.config.base import PeftConfig


class PromptLearningConfig(PeftConfig):
    """Base of the prompt methods' configs. Dimensions left out are taken from the model when the adapter is made."""

    num_virtual_tokens: int | None = Field(default=None, ge=1)
    """Number of virtual tokens put before the input."""
    token_dim: int | None = Field(default=None, ge=1)
    """Width of the model's input embeddings."""
    num_transformer_submodules: int | None = Field(default=None, ge=1)
    """1 for decoder-only and encoder-only models, 2 for encoder-decoder models."""
    num_attention_heads: int | None = Field(default=None, ge=1)
    """Attention heads per layer."""
    num_layers: int | None = Field(default=None, ge=1)
    """Layers of the model."""
    modules_to_save: list[str] | None = None
    """Names of modules that are trained whole and saved along."""

    #: as who asks the config for the kind of method has it
    is_prompt_learning: ClassVar[bool] = True
