"""Caches of keys and values, as transformers has them: under which name a call takes one, what it holds, making one.

Releases call the same thing differently: `past_key_values` until 5.23, `cache` since 5.24. So the name is asked of the
model: of its signature where that says it, else of what a call on the meta device does with a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from peftc.host.torch_modules import context_depth, leave_contexts
from peftc.registry.boundary import is_out_of_memory

# transformers is imported by the functions: models of plain torch do without it

#: Names that releases have for the cache of a call and of its output, newest first.
NAMES = ("cache", "past_key_values")

#: What foreign code raises on a call that it cannot answer; a model that does is one whose cache is not known.
_NO_ANSWER = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)

_found: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


# names ----------------------------------------------------------------------------------------------------------------


def keyword(model: nn.Module) -> str | None:
    """The keyword under which the model's call takes a cache; None if it takes none.

    Relied on: a parameter of `forward` is annotated with `Cache` and has one of `NAMES` (since 5.0), or a call takes one
    in `**kwargs`, which a copy of the model on the meta device shows.
    """
    if model not in _found:
        _found[model] = _of_signature(model) or _of_call(model)
    return _found[model]


def _of_signature(model: nn.Module) -> str | None:
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in NAMES if name in parameters), None) or next(
        (name for name, parameter in parameters.items() if _is_cache(parameter.annotation)), None
    )


def _is_cache(annotation: Any) -> bool:
    """Whether a parameter's annotation, which may be text, means a cache."""
    parts = str(annotation).replace("|", " ").replace("[", " ").replace("]", " ").replace(",", " ").split()
    names = {part.strip("'\"").rpartition(".")[2] for part in parts} | {getattr(annotation, "__name__", "")}
    return not names.isdisjoint({"Cache", "DynamicCache", "EncoderDecoderCache"})


def _of_call(model: nn.Module) -> str | None:
    """The name of `NAMES` under which a call fills a cache. A signature without `**kwargs` hides none."""
    kinds = {parameter.kind for parameter in inspect.signature(type(model).forward).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return None
    return next((name for name in NAMES if fills(model, name)), None)


def fills(model: nn.Module, name: str) -> bool | None:
    """Whether a call that is given a cache under a name puts its tokens into it; None if a copy of the model on the meta
    device, which has no weights, cannot answer."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    grad, depth = torch.is_grad_enabled(), context_depth()
    try:
        with torch.no_grad(), torch.device("meta"):
            copy = type(model)(model.config).eval()
            ids = torch.zeros(1, 2, dtype=torch.long)
            call = {"input_ids": ids} | ({"decoder_input_ids": ids} if encodes(model.config) else {})
            cache = made(model.config)
            copy(**call, **{name: cache}, use_cache=True)
            return length(cache) == ids.shape[1]
    except _NO_ANSWER as error:
        if is_out_of_memory(error):  # which is no answer of the model's
            raise
        leave_contexts(depth)  # if it was on the way out that something failed
        torch.set_grad_enabled(grad)
        return None


def taken(call: dict[str, Any]) -> Any:
    """Take the cache out of a call's keywords, under whichever name it is there; None if there is none."""
    given = [call.pop(name) for name in NAMES if name in call]
    given += [call.pop(name) for name in [name for name, value in call.items() if is_cache(value)]]
    return next((cache for cache in given if cache is not None), None)


def of_call(call: Mapping[str, Any]) -> Any:
    """The cache among a call's keywords, which stay as they are."""
    return taken(dict(call))


def of_outputs(outputs: Any) -> Any:
    """The cache that a model's outputs hold; None if there is none.

    Relied on: outputs are a mapping or a tuple that has the cache as one of its values (since 5.0).
    """
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else ()
    return next((value for value in values if is_cache(value)), None)


# what a cache holds ---------------------------------------------------------------------------------------------------


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of transformers."""
    from transformers import Cache

    return isinstance(value, Cache)


def length(cache: Any) -> int:
    """Tokens that a cache holds; no cache holds none."""
    return 0 if cache is None else int(cache.get_seq_length())


def capacity(cache: Any) -> int | None:
    """How many tokens a cache of fixed length has room for; None if it grows. Sliding layers are cut to their window.

    Relied on: layers of fixed length have `max_cache_len` (since 5.0).
    """
    layers = () if cache is None else decoding(cache).layers
    return max((int(layer.max_cache_len) for layer in layers if "max_cache_len" in vars(layer)), default=None)


def decoding(cache: Any) -> Any:
    """The part of a cache that grows with what is decoded: that of self-attention, where there are two."""
    from transformers import EncoderDecoderCache

    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def keeps_keys(cache: Any, index: int) -> bool:
    """Whether the layer has keys of its own in the cache.

    Relied on: a cache without a config has no layers until they are filled, and says of which class they will be
    (`layer_class_to_replicate`, since 5.0).
    """
    from transformers.cache_utils import CacheLayerMixin

    if index >= len(cache.layers):
        return cache.layer_class_to_replicate is not None
    return isinstance(cache.layers[index], CacheLayerMixin)


# making one -----------------------------------------------------------------------------------------------------------


def encodes(config: Any) -> bool:
    """Whether a model with this config has an encoder beside its decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def decoder_config(config: Any) -> Any:
    """The config of the decoder's layers; None without a config."""
    return config.get_text_config(decoder=True) if config is not None else None


def made(config: Any) -> Any:
    """An empty cache that grows, for a model with this config."""
    from transformers import DynamicCache, EncoderDecoderCache

    decoder = decoder_config(config)
    if encodes(config):
        return EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))
    return DynamicCache(config=decoder)


def room_for(cache: Any, config: Any, tokens: int) -> Any:
    """An empty cache with room for so many tokens more: the given one, one like it that is longer, or a new one."""
    from transformers import EncoderDecoderCache, StaticCache

    if cache is None:
        return made(config)
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(room_for(cache.self_attention_cache, config, tokens), cache.cross_attention_cache)
    if isinstance(cache, StaticCache):
        return StaticCache(config=decoder_config(config), max_cache_len=(capacity(cache) or 0) + tokens)
    return cache
