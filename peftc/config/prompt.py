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

    @property
    def rows(self) -> int:
        """Rows of a table of embeddings: virtual tokens of all submodules. 0 where the model was not asked yet."""
        return (self.num_virtual_tokens or 0) * (self.num_transformer_submodules or 1)

    @property
    def width(self) -> int:
        """Their width; 0 likewise."""
        return self.token_dim or 0

    @property
    def cache_width(self) -> int:
        """Width of a table of keys and values, of all layers."""
        return (self.num_layers or 0) * 2 * self.width
