"""Small functions on token sequences and caches that the reference exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from peftc import rules
from peftc.diagnostics import PeftcError


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels as a decoder's input: `(batch, length)` moved right by one, a start token first, `-100` as padding.

    Raises `PeftcError` without a padding token.
    """
    if pad_token_id is None:
        what = "`pad_token_id` is None, and labels that do not count become padding"
        raise PeftcError(rules.BAD_VALUE(what, fix="Set `model.config.pad_token_id`."))
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of a prefix as Bloom's attention took them before transformers' own caches.

    Each tensor is `(2 · layers_i, batch, heads, tokens, head_dim)`, keys of all layers before the values of all. Returns
    for each layer keys `(batch · heads, head_dim, tokens)` and values `(batch · heads, tokens, head_dim)`.
    """
    joined = torch.cat(tuple(past_key_values))
    layers = joined.shape[0] // 2
    rows, tokens, width = joined.shape[1] * joined.shape[2], joined.shape[3], joined.shape[4]
    keys = joined[:layers].transpose(2, 3).reshape(layers, rows, width, tokens)
    values = joined[layers:].reshape(layers, rows, tokens, width)
    return tuple(zip(keys, values, strict=True))


#: Model types whose prefixes need reshaping; with the caches of transformers 5 there is none.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: Mapping[str, Callable[..., object]] = MappingProxyType({})
