"""Generation with virtual tokens: what each step is given, and whether what the host makes of it fits.

Only the first step has the virtual tokens in its input; later ones find them in the cache. How many tokens a step is about
is counted here, from what `generate` was given: every call of the model is held to it, so that a host that prepares its
steps in another way meets an error and never gives other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.host import caches
from peftc.host.generation import NEXT_LENGTH, Prepare
from peftc.runtime.prompt import cache
from peftc.runtime.prompt.streams import INPUT, Call, Stream, length_of
from peftc.runtime.prompt.tasks import widened
from peftc.runtime.prompt.tokens import VirtualTokens

_UNKNOWN_STEPS = (
    "Give masks and positions for the whole input without virtual tokens, or none. If nothing of that kind was \
given, this release of transformers prepares its steps in a way that is not known here: use one that was tried."
)


@dataclass(frozen=True)
class Start:
    """What generation started from. `ids` counts the ids given; `offset` is how many more tokens there are: embeddings in
    the place of ids, or earlier ones that only the mask and the cache know of. `placed`: positions were given."""

    ids: int
    offset: int
    placed: bool

    @classmethod
    def of(cls, call: Mapping[str, Any], stream: Stream) -> Start:
        """What a call of `generate`, or one step of it, starts from."""
        inputs = call.get("inputs") if stream is INPUT and call.get(stream.ids) is None else call.get(stream.ids)
        ids = 0 if inputs is None else int(inputs.shape[1])
        mask, embeds = call.get(stream.mask), call.get(stream.embeds)
        known = mask if mask is not None and mask.dim() == 2 else embeds
        tokens = ids if known is None else int(known.shape[1])
        return cls(ids, tokens - ids, call.get(stream.positions) is not None)


def fits(told: int, held: int, what: str) -> None:
    """Raise `PeftcError` unless what says so is about as many tokens, without virtual ones, as cache and input hold."""
    if told != held:
        what = f"{what} is about {told} tokens, cache and input hold {held}"
        raise PeftcError(rules.STEP_UNFIT(what, fix=_UNKNOWN_STEPS))


class Steps:
    """One run of generation with virtual tokens."""

    def __init__(self, tokens: VirtualTokens, own: Mapping[str, Any], start: Start) -> None:
        self.virtual = tokens
        self.own = own
        self.start = start
        #: tokens without virtual ones that the step is about, the earlier ones included; None before the first step
        self.tokens: int | None = None
        #: where the step's newest token stands in each row, `(batch,)`; None where it is the last place
        self.newest: Tensor | None = None
        self.watched = 0
        #: what the cache held when the model was called
        self.held = 0

    # what a step is given -----------------------------------------------------------------------------------------

    def prepared(self, prepare: Prepare, ids: Tensor, kwargs: Mapping[str, Any]) -> Call:
        """The inputs of one step, for ids `(batch, length)`. `prepare` is the model's own function for it."""
        stream, virtual = self.virtual.cached, self.virtual.cached_tokens
        call = dict(kwargs)
        if call.get("use_cache") is False:  # what an earlier step filled for the virtual tokens alone
            caches.taken(call)
        self.tokens = ids.shape[1] + self.start.offset
        if not virtual:
            return prepare(ids, **call)
        if self.virtual.encoder.place.is_cache:
            return self._behind_keys(prepare, ids, call)
        call.pop(stream.positions, None)
        _widen_mask(call, stream, virtual)
        held = caches.length(caches.of_call(call))
        inputs = self._later(prepare, ids, call, held) if held else self._first(prepare, ids, call)
        # The model counts positions itself, from the cache or from a mask of two dimensions: a mask of four that the host made
        # would have to come with positions, and only the model knows whether it counts padding.
        inputs.pop(stream.positions, None)
        mask = inputs.get(stream.mask)
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            inputs[stream.mask] = call.get(stream.mask)
        return inputs

    def _behind_keys(self, prepare: Prepare, ids: Tensor, call: Call) -> Call:
        """A step of which the virtual tokens are in the cache from the start."""
        tokens, stream = self.virtual, self.virtual.cached
        positions = call.get(stream.positions)
        if positions is not None:
            positions = self._positions(positions, call.get(stream.mask)) + tokens.cached_tokens
            call[stream.positions] = positions
            self.newest = positions[:, -1] if positions.dim() == 2 else None
        _widen_mask(call, stream, tokens.cached_tokens)
        name, past = self._cache(call)
        if not caches.length(past):
            call[name] = tokens.filled(past, ids.shape[0], self.own)
        return self._later(prepare, ids, call, caches.length(call[name]))

    def _first(self, prepare: Prepare, ids: Tensor, call: Call) -> Call:
        """A step with the virtual tokens in its input. The model prepares it for ids of which there are as many; then
        embeddings take their place."""
        tokens, stream = self.virtual, self.virtual.cached
        embeds = call.pop(stream.embeds, None)
        name, past = self._cache(call)
        if past is not None:
            call[name] = caches.room_for(past, tokens.config, tokens.cached_tokens)
            if tokens.held is not None:
                cache.mark(call[name], tokens.held)
        call.pop(NEXT_LENGTH, None)
        tables = tokens.tables(ids.shape[0], self.own)[:, -tokens.cached_tokens :]
        parts = [embeds, ids[:, self.start.ids :]] if embeds is not None else [ids]
        parts = [tokens.embedded(part) if part.dim() == 2 else part for part in parts]
        whole = torch.cat([tables.to(parts[0].dtype), *parts], dim=1)
        inputs = prepare(ids.new_zeros(whole.shape[:2]), **call)
        inputs[stream.ids], inputs[stream.embeds] = None, whole
        return inputs

    def _later(self, prepare: Prepare, ids: Tensor, call: Call, held: int) -> Call:
        """A step with a cache in which the virtual tokens are: what it does not hold yet is computed."""
        assert self.tokens is not None
        call[NEXT_LENGTH] = self.virtual.cached_tokens + self.tokens - held
        return prepare(ids, **call)

    def _cache(self, call: Mapping[str, Any]) -> tuple[str, Any]:
        """The step's cache and the name that it has; the model's name for it where it has none. Raises `PeftcError` if the
        virtual tokens need one and the model, whose backbone may, takes none by itself."""
        found = next(((name, value) for name, value in call.items() if caches.is_cache(value)), None)
        name = caches.keyword(self.virtual.model)
        if found is None and name is None and self.virtual.encoder.place.is_cache:
            what = f"`{type(self.virtual.model).__name__}` takes no cache when it generates"
            raise PeftcError(
                rules.NO_CACHE(what, fix="Generate with `use_cache=True`, or use a method that needs none.")
            )
        return found or (name or caches.NAMES[0], None)

    def _positions(self, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Positions of the tokens without virtual ones: those given to `generate`, or counted anew. What the host counts
        may have the cache in it already. Positions of more than two dimensions are the model's own matter."""
        if self.start.placed or positions.dim() != 2:
            return positions
        if mask is None:
            assert self.tokens is not None
            return torch.arange(self.tokens, device=positions.device).unsqueeze(0).expand(positions.shape[0], -1)
        return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)

    # whether it fits ----------------------------------------------------------------------------------------------

    def watch(self, call: Mapping[str, Any]) -> None:
        """Raise `PeftcError` unless a call of the model is about the tokens that the step was prepared for."""
        if torch.compiler.is_compiling():
            return
        if self.tokens is None:
            raise PeftcError(self._not_asked())
        stream, virtual = self.virtual.cached, self.virtual.cached_tokens
        new = length_of(call, stream) or 0
        past = caches.of_call(call)
        self.held = caches.length(past)
        held = new + self.held - virtual
        fits(self.tokens, held, "The step")
        mask, positions = call.get(stream.mask), call.get(stream.positions)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != caches.capacity(past):
            fits(int(mask.shape[1]) - virtual, held, "The mask")
        if positions is not None:
            fits(int(positions.shape[-1]), new, "The list of positions")
            self._watch_positions(positions, held + virtual - 1)

    def watch_cache(self, call: Mapping[str, Any]) -> None:
        """After the first call: raise `PeftcError` if the model did not use the cache in which its prompt is."""
        encoder = self.virtual.encoder
        if encoder.place.is_cache and not encoder.seen and not torch.compiler.is_compiling():
            cache.refuse_unused(self.virtual.model, caches.of_call(call), self.held)
            encoder.seen = True

    def _watch_positions(self, positions: Tensor, last: int) -> None:
        """The same for the places where the tokens of a call stand, in the first two calls: later ones only count on."""
        self.watched += 1
        if self.watched > 2 or positions.dim() != 2:
            return
        expected = positions.new_tensor([last]) if self.newest is None else self.newest.to(positions.device)
        wrong = (positions[:, -1] != expected).nonzero()
        if len(wrong):
            row = int(wrong[0])
            at = int(expected[row if len(expected) > 1 else 0])
            what = f"Row {row} has its newest token at position {int(positions[row, -1])} and not at {at}"
            raise PeftcError(rules.STEP_UNFIT(what, fix=_UNKNOWN_STEPS))

    def refuse_unused(self) -> None:
        """Raise `PeftcError` if generation never asked for the inputs of a step."""
        if self.tokens is None:
            raise PeftcError(self._not_asked())

    def _not_asked(self) -> Any:
        what = "Generation called the model without asking it for the inputs of the step"
        fix = "Use a release of transformers that `peftc doctor` lists as tried."
        return rules.STEP_UNFIT(what, fix=fix)


def _widen_mask(call: Call, stream: Stream, virtual: int) -> None:
    """Let a step's mask `(batch, length)` count the virtual tokens too."""
    mask = call.get(stream.mask)
    if mask is not None and mask.dim() == 2:
        call[stream.mask] = widened(mask, virtual, 1)
