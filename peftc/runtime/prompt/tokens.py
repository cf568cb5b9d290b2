"""The virtual tokens of one model's calls: how many there are, where they go, and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftc.host import caches
from peftc.runtime.prompt import cache
from peftc.runtime.prompt.cache import Held
from peftc.runtime.prompt.encoder import PromptModule
from peftc.runtime.prompt.streams import DECODER, INPUT
from peftc.tuner.prompt import Place


class VirtualTokens:
    """Those of one encoder before the input of one model."""

    def __init__(self, model: nn.Module, encoder: PromptModule) -> None:
        self.model = model
        self.encoder = encoder
        self.config = getattr(model, "config", None)
        self.encodes = caches.encodes(self.config)
        #: the input whose attention layers have the cache
        self.cached = DECODER if self.encodes else INPUT

    @property
    def cached_tokens(self) -> int:
        """How many virtual tokens come before the input that has the cache."""
        if self.encodes and not self.encoder.place.is_cache:
            return self.encoder.tokens if self.goes_before_decoder() else 0
        return self.encoder.tokens

    @property
    def held(self) -> Held | None:
        """What a cache says that has the virtual tokens in it; None where none are in a cache."""
        return Held(self.encoder.name, self.cached_tokens) if self.cached_tokens else None

    def tables(self, rows: int, own: Mapping[str, Any]) -> Tensor:
        """The virtual tokens of each row, `(rows, tokens, width)`, those of a decoder after those of its encoder."""
        return self.encoder.rows(rows, own.get("task_ids"))

    def embedded(self, ids: Tensor) -> Tensor:
        """The model's embeddings of ids, `(batch, length, hidden)`."""
        embeds: Tensor = self.model.get_input_embeddings()(ids)  # type: ignore[operator]  # a model with embeddings
        return embeds

    def goes_before_decoder(self) -> bool:
        """Whether a second table goes before the decoder's input."""
        return self.encoder.place is Place.INPUTS and self.encoder.site.shape[0] > self.encoder.tokens

    def filled(self, given: Any, rows: int, own: Mapping[str, Any]) -> Any:
        """A cache that holds the virtual tokens for so many rows: the given one, which is empty, or one with more room."""
        c = self.encoder.config
        tables = self.tables(rows, own).to(self.model.get_input_embeddings().weight.dtype)  # type: ignore[operator,union-attr]
        room = caches.room_for(given, self.config, self.encoder.tokens)
        filled = cache.fill(
            room, tables, self.config, c.num_layers, c.num_attention_heads, c.num_transformer_submodules
        )
        if self.held is not None:
            cache.mark(filled, self.held)
        return filled
