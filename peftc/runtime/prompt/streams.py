"""Inputs of a model as streams: the keywords that belong to one sequence of tokens, and how long it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftc import rules
from peftc.diagnostics import PeftcError

Call = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """Keywords of one input of a model."""

    ids: str
    embeds: str
    mask: str
    positions: str


INPUT = Stream("input_ids", "inputs_embeds", "attention_mask", "position_ids")
DECODER = Stream("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "decoder_position_ids")


def given(call: Mapping[str, Any], stream: Stream) -> Any:
    """The stream's embeddings `(batch, length, hidden)` or ids `(batch, length)`; None if it has neither."""
    return call.get(stream.ids) if call.get(stream.embeds) is None else call[stream.embeds]


def length_of(call: Mapping[str, Any], stream: Stream) -> int | None:
    """Tokens of the stream in a call; None if it has none."""
    found = given(call, stream)
    return None if found is None else int(found.shape[1])


def rows_of(call: Mapping[str, Any], stream: Stream) -> int:
    """Rows of a stream. Raises `PeftcError` if there is nothing to put the prompt before."""
    found = given(call, stream)
    if found is None:
        fix = f"Give `{stream.ids}` or `{stream.embeds}`."
        raise PeftcError(rules.CALL_NOT_POSSIBLE("There is no input to put the prompt before", fix=fix))
    return int(found.shape[0])
