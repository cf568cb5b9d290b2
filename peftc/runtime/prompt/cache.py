"""Virtual tokens as keys and values: which of transformers' caches they go into, and each layer's share of the table.

What a layer's cache holds is read off the model's config: layers that share the keys of others or have none are passed
over, narrower layers take the first heads. Nothing here is decided by a model's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError, Severity, warn

#: Keys and values of these configs are not heads of one width.
_COMPRESSED = "kv_lora_rank"


def backbone_name(model: nn.Module) -> str | None:
    """The first child that is a model of transformers itself; None if there is none."""
    from transformers import PreTrainedModel

    return next((name for name, child in model.named_children() if isinstance(child, PreTrainedModel)), None)


def taker(model: nn.Module) -> nn.Module:
    """The module whose call takes a cache: the model, or its backbone. Raises `PeftcError` if neither does."""
    name = backbone_name(model)
    for module in (model, *([] if name is None else [model.get_submodule(name)])):
        if "past_key_values" in inspect.signature(module.forward).parameters:
            config = getattr(module, "config", None)
            if getattr(_decoder_config(config), _COMPRESSED, None) is None:
                return module
            what = f"`{type(model).__name__}` keeps compressed keys and values, which are of no width of their own"
            raise PeftcError(rules.NO_CACHE(what, fix="Use a method that puts embeddings before the input."))
    what = f"`{type(model).__name__}` takes no past keys and values"
    raise PeftcError(rules.NO_CACHE(what, fix="Use a method that puts embeddings before the input."))


def is_empty(cache: Any) -> bool:
    """Whether a cache holds nothing yet; no cache holds nothing."""
    return cache is None or int(cache.get_seq_length()) == 0


def refuse_checkpointing(model: nn.Module) -> None:
    """Raise `PeftcError` if layers are checkpointed: they would compute without the cache."""
    if any(module.__dict__.get("gradient_checkpointing", False) for module in model.modules()):
        what = "Gradient checkpointing is on, and the virtual tokens are keys and values"
        raise PeftcError(
            rules.CHECKPOINTING_DROPS(what, fix="Call `gradient_checkpointing_disable()` on the base model.")
        )


def room_for(cache: Any, config: Any, tokens: int) -> Any:
    """An empty cache with room for the virtual tokens: the given one, or one like it that is longer, or a new one."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    decoder = _decoder_config(config)
    if isinstance(cache, EncoderDecoderCache):
        own = room_for(cache.self_attention_cache, config, tokens)
        return EncoderDecoderCache(own, cache.cross_attention_cache)
    if isinstance(cache, StaticCache):
        return StaticCache(config=decoder, max_cache_len=max(_lengths(cache)) + tokens)
    if cache is not None:
        return cache
    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))
    return DynamicCache(config=decoder)


def _lengths(cache: Any) -> list[int]:
    """Lengths of the layers that have one; sliding layers are cut to their window."""
    return [int(layer.max_cache_len) for layer in cache.layers if "max_cache_len" in vars(layer)]


def fill(cache: Any, table: Tensor, config: Any, layers: int, heads: int, stride: int) -> Any:
    """Put the table `(batch, tokens, layers · 2 · heads · width)` into an empty cache, and return the cache.

    Layer `i` takes share `stride · i`, counted round: the reference deals the table of an encoder-decoder out by twos.
    """
    decoder = _decoder_config(config)
    own = getattr(cache, "self_attention_cache", cache)
    batch, tokens, size = table.shape
    width = size // (2 * layers * heads)
    shares = table.reshape(batch, tokens, layers, 2, heads, width).permute(2, 3, 0, 4, 1, 5)
    for index, (rows, columns) in enumerate(_layer_shapes(decoder, layers, heads, width)):
        if rows and _keeps_keys(own, index):
            key, value = shares[(stride * index) % layers]
            own.update(key[:, :rows, :, :columns], value[:, :rows, :, :columns], index)
    return cache


def refuse_unfit(model: nn.Module, layers: int, heads: int, width: int) -> None:
    """Raise `PeftcError` if a table of that layout has no place in the model's cache; warn of layers that cannot take part."""
    config = taker(model).config
    refuse_checkpointing(model)
    own = room_for(None, config, 0)
    own = getattr(own, "self_attention_cache", own)
    shapes = list(_layer_shapes(_decoder_config(config), layers, heads, width))
    keep = [index for index in range(len(shapes)) if _keeps_keys(own, index)]
    unfit = [index for index in keep if not shapes[index][0]]
    if unfit or not keep:
        some = len(unfit) < len(keep)
        what = f"{len(unfit) if keep else 'All'} layers have keys of other shapes than {heads} heads of {width}"
        fix = "They stay without virtual tokens." if some else "Use a method that puts embeddings before the input."
        told = rules.NO_CACHE(what, fix=fix, severity=Severity.WARNING if some else Severity.ERROR)
        if not some:
            raise PeftcError(told)
        warn([told])


def _keeps_keys(cache: Any, index: int) -> bool:
    """Whether the layer has keys of its own; a cache without a config makes its layers when they are filled."""
    from transformers.cache_utils import CacheLayerMixin

    if index >= len(cache.layers):
        return cache.layer_class_to_replicate is not None
    return isinstance(cache.layers[index], CacheLayerMixin)


def _layer_shapes(decoder: Any, layers: int, heads: int, width: int) -> Iterator[tuple[int, int]]:
    """Heads and width of each layer's keys, `(0, 0)` where they are more than the table has."""
    apart = decoder.per_layer_config if getattr(decoder, "is_heterogeneous", False) else ()
    for index in range(min(layers, decoder.num_hidden_layers)):
        rows, columns = (apart[index].num_key_value_heads, apart[index].head_dim) if apart else (heads, width)
        yield (rows, columns) if rows <= heads and columns <= width else (0, 0)


def _decoder_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if config is not None else None
