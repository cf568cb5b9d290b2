"""Virtual tokens as keys and values, and caches that hold virtual tokens: each layer's share of the table, and who knows.

What a layer's cache holds is read off the model's config: layers that share the keys of others or have none are passed
over, narrower layers take the first heads. Nothing here is decided by a model's name. A cache in which a prompt is says so
itself, so that every later call knows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError, Severity, warn
from peftc.host import caches
from peftc.host.layers import recomputes

#: Keys and values of these configs are not heads of one width.
_COMPRESSED = "kv_lora_rank"

_OTHER_METHOD = "Use a method that puts embeddings before the input."


def backbone_name(model: nn.Module) -> str | None:
    """The first child that is a model of transformers itself; None if there is none."""
    from transformers import PreTrainedModel

    return next((name for name, child in model.named_children() if isinstance(child, PreTrainedModel)), None)


def taker(model: nn.Module) -> nn.Module:
    """The module whose call takes a cache: the model, or its backbone. Raises `PeftcError` if neither does."""
    name = backbone_name(model)
    for module in (model, *([] if name is None else [model.get_submodule(name)])):
        if caches.keyword(module) is not None:
            config = getattr(module, "config", None)
            if getattr(caches.decoder_config(config), _COMPRESSED, None) is None:
                return module
            what = f"`{type(model).__name__}` keeps compressed keys and values, which are of no width of their own"
            raise PeftcError(rules.NO_CACHE(what, fix=_OTHER_METHOD))
    what = f"`{type(model).__name__}` takes no past keys and values"
    raise PeftcError(rules.NO_CACHE(what, fix=_OTHER_METHOD))


def refuse_checkpointing(model: nn.Module) -> None:
    """Raise `PeftcError` if layers are checkpointed: they would compute without the cache."""
    if recomputes(model):
        what = "A prompt of keys and values does not work with gradient checkpointing, which is on"
        raise PeftcError(
            rules.CHECKPOINTING_DROPS(what, fix="Call `gradient_checkpointing_disable()` on the base model.")
        )


# who knows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Which adapter's virtual tokens are in a cache, and how many positions they take there."""

    adapter: str
    tokens: int


_HELD = "_peftc_prompt"


def mark(cache: Any, held: Held) -> None:
    """Have a cache say which virtual tokens are in it. Copies of it say the same."""
    if cache is not None and not torch.compiler.is_compiling():
        vars(cache)[_HELD] = held


def held_by(cache: Any) -> Held | None:
    """Which virtual tokens are in a cache; None if it is empty or does not say."""
    return vars(cache).get(_HELD) if cache is not None and caches.length(cache) else None


def refuse_strange(cache: Any, expected: Held | None) -> None:
    """Raise `PeftcError` for a cache that holds other virtual tokens than those expected; None expects none.

    A cache that holds tokens and does not say anything is one that was filled elsewhere: without virtual tokens.
    """
    if cache is None:
        return
    if not caches.is_cache(cache):
        what = f"The cache is a {type(cache).__name__}, not one of transformers' caches"
        raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Give the cache that a call of this model returned."))
    if not caches.length(cache):
        return
    found = held_by(cache)
    if found != expected:
        have = f"the virtual tokens of `{found.adapter}`" if found else "no virtual tokens"
        want = f"those of `{expected.adapter}` ({expected.tokens})" if expected else "none"
        what = f"The cache holds {have}, and the active adapter needs {want}"
        fix = "Go on from a cache that a call with the same adapter returned, or give the whole input without a cache."
        raise PeftcError(rules.CACHE_STRANGE(what, fix=fix))


def refuse_unused(model: nn.Module, cache: Any, before: int) -> None:
    """Raise `PeftcError` if a call that was given a cache of that length did not put its own tokens behind it."""
    if cache is not None and caches.length(cache) <= before:
        raise PeftcError(_unused(model))


def _unused(model: nn.Module) -> Diagnostic:
    return rules.NO_CACHE(f"`{type(model).__name__}` takes a cache and does not use it", fix=_OTHER_METHOD)


# keys and values ------------------------------------------------------------------------------------------------------


def fill(cache: Any, table: Tensor, config: Any, layers: int, heads: int, stride: int) -> Any:
    """Put the table `(batch, tokens, layers · 2 · heads · width)` into an empty cache, and return the cache.

    Layer `i` takes share `stride · i`, counted round: the reference deals the table of an encoder-decoder out by twos.
    """
    decoder = caches.decoder_config(config)
    own = caches.decoding(cache)
    batch, tokens, size = table.shape
    width = size // (2 * layers * heads)
    shares = table.reshape(batch, tokens, layers, 2, heads, width).permute(2, 3, 0, 4, 1, 5)
    for index, (rows, columns) in enumerate(_layer_shapes(decoder, layers, heads, width)):
        if rows and caches.keeps_keys(own, index):
            key, value = shares[(stride * index) % layers]
            own.update(key[:, :rows, :, :columns], value[:, :rows, :, :columns], index)
    return cache


def refuse_unfit(model: nn.Module, layers: int, heads: int, width: int) -> None:
    """Raise `PeftcError` if a table of that layout has no place in the model's cache; warn of layers that cannot take part."""
    module = taker(model)
    config = module.config
    if caches.fills(module, caches.keyword(module) or "") is False:
        raise PeftcError(_unused(model))
    refuse_checkpointing(model)
    own = caches.decoding(caches.made(config))
    shapes = list(_layer_shapes(caches.decoder_config(config), layers, heads, width))
    keep = [index for index in range(len(shapes)) if caches.keeps_keys(own, index)]
    unfit = [index for index in keep if not shapes[index][0]]
    if unfit or not keep:
        some = len(unfit) < len(keep)
        what = f"{len(unfit) if keep else 'All'} layers have keys of other shapes than {heads} heads of {width}"
        fix = "They stay without virtual tokens." if some else _OTHER_METHOD
        told = rules.NO_CACHE(what, fix=fix, severity=Severity.WARNING if some else Severity.ERROR)
        if not some:
            raise PeftcError(told)
        warn([told])


def _layer_shapes(decoder: Any, layers: int, heads: int, width: int) -> Iterator[tuple[int, int]]:
    """Heads and width of each layer's keys, `(0, 0)` where they are more than the table has."""
    apart = decoder.per_layer_config if getattr(decoder, "is_heterogeneous", False) else ()
    for index in range(min(layers, decoder.num_hidden_layers)):
        rows, columns = (apart[index].num_key_value_heads, apart[index].head_dim) if apart else (heads, width)
        yield (rows, columns) if rows <= heads and columns <= width else (0, 0)
