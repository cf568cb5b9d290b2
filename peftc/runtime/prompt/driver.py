"""The one driver of prompts: it puts virtual tokens into a call, and makes what belongs to the input as long.

What differs between methods is declared by them (`place`, labels, loss), what differs between tasks is in a table, and
what differs between models is read off their configs. Caches in which it put virtual tokens say so; calls that go on from
a cache are held to that. Generation is the same, step by step (`peftc.runtime.prompt.generation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError, warn
from peftc.host import caches
from peftc.host.generation import Prepare, calls_watched, steps_prepared
from peftc.runtime.prompt import cache
from peftc.runtime.prompt.generation import Start, Steps, fits
from peftc.runtime.prompt.streams import DECODER, INPUT, Call, Stream, length_of, rows_of
from peftc.runtime.prompt.tasks import call_of, widened
from peftc.runtime.prompt.tokens import VirtualTokens
from peftc.tuner.prompt import Place


class PromptDriver(VirtualTokens):
    """Changes calls of one model so that the given encoder's tokens come first."""

    # a call -------------------------------------------------------------------------------------------------------

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's answer to a call with the virtual tokens in it."""
        own, rest = self.split(kwargs)
        call = self.widened(args, rest, own)
        outputs = self.model(**call) if not self.encoder.place.is_cache else self._with_cache(call)
        if self.held is not None:
            cache.mark(caches.of_outputs(outputs), self.held)
        labels = call.get("labels")
        if labels is None:
            return outputs
        return _with_loss(outputs, lambda logits: self.encoder.loss(logits, labels, own))

    def split(self, kwargs: Mapping[str, Any]) -> tuple[Call, Call]:
        """The method's own keywords, and the model's."""
        own = {name: kwargs[name] for name in self.encoder.keywords if kwargs.get(name) is not None}
        return own, {name: value for name, value in kwargs.items() if name not in self.encoder.keywords}

    def widened(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Mapping[str, Any]) -> Call:
        """Keywords for a call with the virtual tokens in it.

        Embeddings in front: `input_ids` `(batch, length)` or `inputs_embeds` `(batch, length, hidden)` becomes embeddings of
        length `virtual + length`; masks, token types and labels grow. Keys and values: the cache holds them, masks grow.
        Raises `PeftcError` for a call that goes on from a cache in which the prompt is not, or which does not fit it.
        """
        call = _named(args, kwargs)
        self._token_types(call)
        past = caches.taken(call)
        cache.refuse_strange(past, self.held)
        if caches.length(past):
            self._refuse_unfit(call, past)
        if self.encoder.place.is_cache:
            self._fill(call, past, own)
            return call
        if past is not None:
            call[caches.keyword(self.model) or caches.NAMES[0]] = past
        holds = caches.length(past) > 0
        if call.get("position_ids") is not None:
            what = "`position_ids` are ignored: the virtual tokens move every position"
            warn([rules.POSITIONS_IGNORED(what, fix="Leave them out.")])
        for name in ("position_ids", "cache_position"):
            call.pop(name, None)
        self._mask(call, INPUT)
        if call.get("encoder_outputs") is None and not (holds and not self.encodes):
            self._prepend(call, INPUT, self.tables(rows_of(call, INPUT), own)[:, : self.encoder.tokens])
        if self.encodes and self.encoder.place is Place.INPUTS:
            if not holds:
                self._prepend_decoder(call, own)
            elif self.goes_before_decoder():
                self._mask(call, DECODER)
        if not holds and (self.encoder.place is Place.INPUTS or not self.encodes):
            self._labels(call, own)
        return call

    def _refuse_unfit(self, call: Mapping[str, Any], past: Any) -> None:
        """Raise `PeftcError` if a mask is not as long as what the cache holds and what comes now, without virtual tokens."""
        mask, new = call.get(self.cached.mask), length_of(call, self.cached)
        if mask is None or new is None or mask.dim() != 2:
            return
        fits(int(mask.shape[1]), new + caches.length(past) - self.cached_tokens, f"`{self.cached.mask}`")

    def _token_types(self, call: Call) -> None:
        """Token types of the virtual tokens are zero, where the task has any."""
        types = call.pop("token_type_ids", None)
        if types is None:
            return
        if not call_of(self.encoder.config.task_type).token_types:
            what = "`token_type_ids` are ignored: this task has none with a prompt"
            warn([rules.INPUT_IGNORED(what, fix="Leave them out.")])
        elif self.encoder.place.is_cache:
            call["token_type_ids"] = types
        else:
            call["token_type_ids"] = widened(types, self.encoder.tokens, 0)

    def _mask(self, call: Call, stream: Stream) -> None:
        mask = call.get(stream.mask)
        if mask is None:
            return
        if mask.dim() != 2:
            what = f"`{stream.mask}` has {mask.dim()} dimensions, so it cannot be widened for the virtual tokens"
            raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Give one of shape (batch, length)."))
        call[stream.mask] = widened(mask, self.encoder.tokens, 1)

    def _prepend(self, call: Call, stream: Stream, tables: Tensor) -> None:
        ids, embeds = call.pop(stream.ids, None), call.get(stream.embeds)
        if embeds is None:
            embeds = self.embedded(ids)
        call[stream.embeds] = torch.cat([tables.to(embeds.dtype), embeds], dim=1)

    def _prepend_decoder(self, call: Call, own: Mapping[str, Any]) -> None:
        """The second table before the decoder's input, which labels may stand for."""
        if call.get(DECODER.ids) is None and call.get(DECODER.embeds) is None:
            shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if call.get("labels") is None or shift is None:
                what = "There is no decoder input to put the prompt before"
                raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Give `decoder_input_ids` or `labels`."))
            call[DECODER.ids] = shift(labels=call["labels"])
        self._mask(call, DECODER)
        tables = self.tables(rows_of(call, DECODER), own)
        if self.goes_before_decoder():
            self._prepend(call, DECODER, tables[:, self.encoder.tokens :])

    def _labels(self, call: Call, own: Mapping[str, Any]) -> None:
        """Labels of each token grow with the input; virtual tokens have none but those that the method gives them."""
        labels = call.get("labels")
        if labels is None or not call_of(self.encoder.config.task_type).labels:
            return
        given = self.encoder.labels(labels, own)
        grown = given is None and (not self.encodes or self.goes_before_decoder())
        call["labels"] = widened(labels, self.encoder.tokens, -100) if grown else (labels if given is None else given)

    # keys and values ----------------------------------------------------------------------------------------------

    def _fill(self, call: Call, past: Any, own: Mapping[str, Any]) -> None:
        """The cache with the virtual tokens in it, mask and positions to fit."""
        self._mask(call, self.cached)
        positions = call.get(self.cached.positions)
        if positions is not None:
            call[self.cached.positions] = positions + self.encoder.tokens
        filled = past if caches.length(past) else self.filled(past, self._batch(call), own)
        call[caches.keyword(cache.taker(self.model)) or caches.NAMES[0]] = filled

    def _batch(self, call: Call) -> int:
        outputs = call.get("encoder_outputs")
        return int(outputs[0].shape[0]) if outputs is not None else rows_of(call, INPUT)

    def _with_cache(self, call: Call) -> Any:
        """Call the model; where only its backbone takes a cache, hand it in there."""
        if self.model.training:
            cache.refuse_checkpointing(self.model)
        taker = cache.taker(self.model)
        past = caches.of_call(call)
        before = caches.length(past)
        if taker is self.model:
            outputs = self.model(**call)
        else:
            caches.taken(call)
            with _handed_in(taker, past):
                outputs = self.model(**call)
        if not self.encoder.seen and not torch.compiler.is_compiling():
            cache.refuse_unused(self.model, past, before)
            self.encoder.seen = True
        return outputs

    # generation ---------------------------------------------------------------------------------------------------

    def generate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's generation with the virtual tokens before what is given."""
        own, call = self.split(kwargs)
        if args and isinstance(args[0], Tensor):
            call["inputs"], args = args[0], args[1:]
        if args:
            what = "With a prompt, only the input can be given to `generate` by position"
            raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Name the other arguments."))
        cache.refuse_strange(caches.of_call(call), self.held)
        self._refuse_chunks(call)
        if not self.encoder.place.is_cache:
            if self.encodes:
                self._encode(call, own)
            else:
                self._token_types(call)
        with self.generating(own, Start.of(call, self.cached)) as steps:
            found = self.model.generate(**call)  # type: ignore[operator]  # a model that generates
        steps.refuse_unused()
        return found

    def _refuse_chunks(self, call: Mapping[str, Any]) -> None:
        """Raise `PeftcError` if the input is to be read in pieces, each of which would be taken for the first."""
        config = call.get("generation_config") or getattr(self.model, "generation_config", None)
        if call.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            what = "`prefill_chunk_size` is set, and the virtual tokens go before the whole input"
            raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Leave it out."))

    def _encode(self, call: Call, own: Mapping[str, Any]) -> None:
        """Virtual tokens before the encoder's input, which `generate` encodes once."""
        if call.pop("encoder_outputs", None) is not None:
            what = "`encoder_outputs` are ignored: they were made without the virtual tokens"
            warn([rules.INPUT_IGNORED(what, fix="Give `input_ids`.")])
        if call.get("inputs") is not None:
            call[INPUT.ids] = call.pop("inputs")
        self._token_types(call)
        self._mask(call, INPUT)
        self._prepend(call, INPUT, self.tables(rows_of(call, INPUT), own)[:, : self.encoder.tokens])

    @contextmanager
    def generating(self, own: Mapping[str, Any], start: Start) -> Iterator[Steps]:
        """While open, what the model prepares for each step has the virtual tokens in it, and each call is held to that."""
        steps = Steps(self, own, start)
        watched = calls_watched(self.model, steps.watch, steps.watch_cache)
        with steps_prepared(self.model, steps.prepared), watched:
            yield steps

    def prepared(self, prepare: Prepare, ids: Tensor, kwargs: Call, own: Mapping[str, Any]) -> Call:
        """The inputs of one step of generation, by itself. `prepare` is the model's own function for it."""
        start = Start.of({self.cached.ids: ids, **kwargs}, self.cached)
        return Steps(self, own, start).prepared(prepare, ids, kwargs)


@contextmanager
def _handed_in(taker: nn.Module, past: Any) -> Iterator[None]:
    """Within, calls of the module have the cache."""
    name = caches.keyword(taker) or caches.NAMES[0]

    def hand_in(module: nn.Module, args: Any, kwargs: Call) -> tuple[Any, Call]:
        return args, {**kwargs, name: past}

    handle = taker.register_forward_pre_hook(hand_in, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The call's arguments by name. Raises `PeftcError` if one that was given by position has no name here."""
    call = dict(kwargs)
    if len(args) > 1 or (args and "input_ids" in call):
        what = "With a prompt, only the input ids can be given by position"
        raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Name the other arguments."))
    if args:
        call["input_ids"] = args[0]
    return call


def _with_loss(outputs: Any, loss_of: Callable[[Tensor], Tensor | None]) -> Any:
    """Outputs with the method's loss in place of the model's, if it has one. Loss and logits come first in a tuple."""
    if isinstance(outputs, tuple):
        loss = loss_of(outputs[1])
        return outputs if loss is None else (loss, *outputs[1:])
    logits = outputs.get("logits")
    loss = None if logits is None else loss_of(logits)
    if loss is not None:
        outputs["loss"] = loss
    return outputs
