"""The one driver of prompts: it puts virtual tokens into a call, and makes what belongs to the input as long.

What differs between methods is declared by them (`place`, labels, loss), what differs between tasks is in a table, and
what differs between models is read off their configs. During generation the same is done to the first step only: later
steps find the virtual tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError, warn
from peftc.runtime.prompt import cache
from peftc.runtime.prompt.encoder import PromptModule
from peftc.runtime.prompt.tasks import call_of, widened
from peftc.tuner.prompt import Place


@dataclass(frozen=True)
class Stream:
    """Keywords of one input of a model."""

    ids: str
    embeds: str
    mask: str
    positions: str


INPUT = Stream("input_ids", "inputs_embeds", "attention_mask", "position_ids")
DECODER = Stream("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "decoder_position_ids")

Call = dict[str, Any]


class PromptDriver:
    """Changes calls of one model so that the given encoder's tokens come first."""

    def __init__(self, model: nn.Module, encoder: PromptModule) -> None:
        self.model = model
        self.encoder = encoder
        self.config = getattr(model, "config", None)
        self.encodes = bool(getattr(self.config, "is_encoder_decoder", False))
        #: the input whose attention layers have the cache
        self.cached = DECODER if self.encodes else INPUT

    # a call -------------------------------------------------------------------------------------------------------

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's answer to a call with the virtual tokens in it."""
        own, rest = self.split(kwargs)
        call = self.widened(args, rest, own)
        outputs = self.model(**call) if not self.encoder.place.is_cache else self._with_cache(call)
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
        """
        call = _named(args, kwargs)
        self._token_types(call)
        if self.encoder.place.is_cache:
            self._fill(call, own)
            return call
        holds = not cache.is_empty(call.get("past_key_values"))
        if call.get("position_ids") is not None:
            what = "`position_ids` are ignored: the virtual tokens move every position"
            warn([rules.POSITIONS_IGNORED(what, fix="Leave them out.")])
        for name in ("position_ids", "cache_position"):
            call.pop(name, None)
        self._mask(call, INPUT)
        if call.get("encoder_outputs") is None and not (holds and not self.encodes):
            self._prepend(call, INPUT, self._tables(_rows(call, INPUT), own)[:, : self.encoder.tokens])
        if self.encodes and self.encoder.place is Place.INPUTS and not holds:
            self._prepend_decoder(call, own)
        if not holds and (self.encoder.place is Place.INPUTS or not self.encodes):
            self._labels(call, own)
        return call

    def _tables(self, rows: int, own: Mapping[str, Any]) -> Tensor:
        return self.encoder.rows(rows, own.get("task_ids"))

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
            embeds = self.model.get_input_embeddings()(ids)  # type: ignore[operator]  # a model with embeddings
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
        tables = self._tables(_rows(call, DECODER), own)
        if tables.shape[1] > self.encoder.tokens:
            self._prepend(call, DECODER, tables[:, self.encoder.tokens :])

    def _labels(self, call: Call, own: Mapping[str, Any]) -> None:
        """Labels of each token grow with the input; virtual tokens have none but those that the method gives them."""
        labels = call.get("labels")
        if labels is None or not call_of(self.encoder.config.task_type).labels:
            return
        given = self.encoder.labels(labels, own)
        grown = given is None and (not self.encodes or self._tables_of_decoder())
        call["labels"] = widened(labels, self.encoder.tokens, -100) if grown else (labels if given is None else given)

    def _tables_of_decoder(self) -> bool:
        return self.encoder.site.shape[0] > self.encoder.tokens

    # keys and values ----------------------------------------------------------------------------------------------

    def _fill(self, call: Call, own: Mapping[str, Any]) -> None:
        """The cache with the virtual tokens in it, mask and positions to fit."""
        self._mask(call, self.cached)
        positions = call.get(self.cached.positions)
        if positions is not None:
            call[self.cached.positions] = positions + self.encoder.tokens
        if cache.is_empty(call.get("past_key_values")):
            call["past_key_values"] = self.filled(call.get("past_key_values"), self._batch(call), own)

    def _batch(self, call: Call) -> int:
        outputs = call.get("encoder_outputs")
        return int(outputs[0].shape[0]) if outputs is not None else _rows(call, INPUT)

    def filled(self, given: Any, rows: int, own: Mapping[str, Any]) -> Any:
        """A cache that holds the virtual tokens for so many rows: the given one, which is empty, or one with more room."""
        c = self.encoder.config
        tables = self._tables(rows, own).to(self.model.get_input_embeddings().weight.dtype)  # type: ignore[operator,union-attr]
        room = cache.room_for(given, self.config, self.encoder.tokens)
        return cache.fill(room, tables, self.config, c.num_layers, c.num_attention_heads, c.num_transformer_submodules)

    def _with_cache(self, call: Call) -> Any:
        """Call the model; where only its backbone takes a cache, hand it in there."""
        if self.model.training:
            cache.refuse_checkpointing(self.model)
        taker = cache.taker(self.model)
        if taker is self.model:
            return self.model(**call)
        past = call.pop("past_key_values")

        def hand_in(module: nn.Module, args: Any, kwargs: Call) -> tuple[Any, Call]:
            return args, {**kwargs, "past_key_values": past}

        handle = taker.register_forward_pre_hook(hand_in, with_kwargs=True)
        try:
            return self.model(**call)
        finally:
            handle.remove()

    # generation ---------------------------------------------------------------------------------------------------

    def generate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's generation with the virtual tokens before what is given."""
        own, call = self.split(kwargs)
        if args and isinstance(args[0], Tensor):
            call["inputs"], args = args[0], args[1:]
        if args:
            what = "With a prompt, only the input can be given to `generate` by position"
            raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Name the other arguments."))
        if self.encodes and not self.encoder.place.is_cache:
            self._encode(call, own)
        with self.generating(own):
            return self.model.generate(**call)  # type: ignore[operator]  # a model that generates

    def _encode(self, call: Call, own: Mapping[str, Any]) -> None:
        """Virtual tokens before the encoder's input, which `generate` encodes once."""
        if call.pop("encoder_outputs", None) is not None:
            what = "`encoder_outputs` are ignored: they were made without the virtual tokens"
            warn([rules.INPUT_IGNORED(what, fix="Give `input_ids`.")])
        if call.get("inputs") is not None:
            call[INPUT.ids] = call.pop("inputs")
        self._token_types(call)
        self._mask(call, INPUT)
        self._prepend(call, INPUT, self._tables(_rows(call, INPUT), own)[:, : self.encoder.tokens])

    @contextmanager
    def generating(self, own: Mapping[str, Any]) -> Iterator[None]:
        """While open, what the model prepares for each step has the virtual tokens in it."""
        model: Any = self.model
        before = model.__dict__.get("prepare_inputs_for_generation")
        prepare = model.prepare_inputs_for_generation

        @wraps(prepare)
        def prepared(input_ids: Tensor, **kwargs: Any) -> Call:
            return self.prepared(prepare, input_ids, kwargs, own)

        model.__dict__["prepare_inputs_for_generation"] = prepared
        try:
            yield
        finally:
            del model.__dict__["prepare_inputs_for_generation"]
            if before is not None:
                model.__dict__["prepare_inputs_for_generation"] = before

    def prepared(self, prepare: Callable[..., Call], ids: Tensor, kwargs: Call, own: Mapping[str, Any]) -> Call:
        """The inputs of one step of generation. `prepare` is the model's own function for it."""
        kwargs = dict(kwargs)
        if kwargs.get("use_cache") is False:  # what an earlier step filled for the virtual tokens alone
            kwargs.pop("past_key_values", None)
        past = kwargs.get("past_key_values")
        holds = not cache.is_empty(past)
        tokens = self.encoder.tokens
        if self.encoder.place.is_cache:
            self._fill_step(kwargs, ids, own)
        elif self.encodes:
            return self._decoder_step(prepare(ids, **kwargs), kwargs, holds, own)
        else:
            kwargs.pop("position_ids", None)
            self._mask(kwargs, INPUT)
            if not holds:
                self._input_step(kwargs, ids, own)
        if holds and kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None:
            kwargs["next_sequence_length"] += tokens  # counted from the cache, which has the virtual tokens too
        return prepare(ids, **kwargs)

    def _input_step(self, kwargs: Call, ids: Tensor, own: Mapping[str, Any]) -> None:
        call: Call = {INPUT.ids: ids, INPUT.embeds: kwargs.get(INPUT.embeds)}
        self._prepend(call, INPUT, self._tables(ids.shape[0], own)[:, : self.encoder.tokens])
        past = kwargs.get("past_key_values")
        if past is not None:
            kwargs["past_key_values"] = cache.room_for(past, self.config, self.encoder.tokens)
        kwargs |= {INPUT.embeds: call[INPUT.embeds], "next_sequence_length": None, "is_first_iteration": True}

    def _fill_step(self, kwargs: Call, ids: Tensor, own: Mapping[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        self._mask(kwargs, self.cached)
        positions = kwargs.get(self.cached.positions)
        if positions is not None:
            kwargs[self.cached.positions] = positions + self.encoder.tokens
        if cache.is_empty(past):
            kwargs["past_key_values"] = self.filled(past, ids.shape[0], own)

    def _decoder_step(self, call: Call, kwargs: Call, holds: bool, own: Mapping[str, Any]) -> Call:
        """A step of an encoder-decoder, whose encoder has the virtual tokens already."""
        if self.encoder.place is not Place.INPUTS or not self._tables_of_decoder():
            return call
        call.pop(DECODER.positions, None)
        call[DECODER.mask] = kwargs.get(DECODER.mask)  # as given: what was made of it is too short
        self._mask(call, DECODER)
        if not holds:
            past = call.get("past_key_values")
            if past is not None:
                call["past_key_values"] = cache.room_for(past, self.config, self.encoder.tokens)
            tables = self._tables(_rows(call, DECODER), own)
            self._prepend(call, DECODER, tables[:, self.encoder.tokens :])
        return call


def _rows(call: Mapping[str, Any], stream: Stream) -> int:
    """Rows of an input. Raises `PeftcError` if there is none to put the prompt before."""
    given = call.get(stream.ids) if call.get(stream.embeds) is None else call[stream.embeds]
    if given is None:
        fix = f"Give `{stream.ids}` or `{stream.embeds}`."
        raise PeftcError(rules.CALL_NOT_POSSIBLE("There is no input to put the prompt before", fix=fix))
    return int(given.shape[0])


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
