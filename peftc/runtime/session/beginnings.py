"""Where in a call adapters begin to act that wait for some of its tokens: found in its ids before anything is computed.

A call that goes on from a cache is looked at with the ids that filled it, which are kept as long as the cache is. In
generation the prompt decides, and what is generated belongs to what it decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import warn
from peftc.host import caches
from peftc.host.generation import calls_replaced
from peftc.registry.boundary import guarded
from peftc.runtime.call import BASE, Call
from peftc.runtime.gates import FromToken
from peftc.runtime.session.applied import Applied

#: cache of keys and values -> the ids that are in it, `(rows, tokens)`
_ids_in: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

#: a place that no token has
_NEVER = 2**62
#: names that models and `generate` have for ids, and for what stands in for them
_IDS, _EMBEDDINGS = ("input_ids", "inputs"), "inputs_embeds"


def beginnings(
    session: Applied,
    names: Sequence[str],
    values: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    by_row: bool = False,
    prompt: bool = False,
) -> FromToken | None:
    """Where the adapters of these names begin, if one of them waits.

    `names` has one for each row if `by_row`, else all are for all rows. `values` and the rest of the call are as it gives them;
    ids of a `prompt` are all there are, those in the call's cache among them. Warns of a call that does not say.
    """
    waiting = [name for name in dict.fromkeys(names) if name != BASE and session.waits(name)]
    if not waiting:
        return None
    own = ids_of(args, kwargs)
    past, ids = (0, own) if prompt else _with_past(own, kwargs)
    window = _tokens(own, kwargs)
    starts = {}
    for name in waiting:
        rows = [row for row, other in enumerate(names) if other == name] if by_row else None
        found = _of_rows({**values, **({} if ids is None else {_IDS[0]: ids})}, rows)
        begins = guarded(session.readers[name].begins, str(session.plans[name].peft_type), None)
        tokens = window if ids is None else ids.shape[1]
        start = begins(session.plans[name].config, found.pop(_IDS[0], None), tokens, found)
        if start is not None:  # what is generated comes after the call's tokens, and begins nothing
            start = torch.where(start >= tokens, _NEVER, start if ids is not None else start + past)
        starts[name] = start
    if (args or kwargs) and any(start is None for start in starts.values()):
        told = ", ".join(f"`{name}`" for name, start in starts.items() if start is None)
        what = f"{told} acts from certain tokens on, and the call has no ids to find them in"
        warn([rules.NOT_BEGUN(what, fix="Call with `input_ids`, or say where it begins.")])
    return FromToken(starts, window + past, window)


def _of_rows(tensors: Mapping[str, Tensor], rows: Sequence[int] | None) -> dict[str, Tensor]:
    return {name: tensor if rows is None else tensor[list(rows)] for name, tensor in tensors.items()}


def ids_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The ids `(rows, tokens)` of a call; None if it has none."""
    given = [*(kwargs.get(name) for name in _IDS), *args[:1]]
    found = next((value for value in given if isinstance(value, Tensor)), None)
    whole = found is not None and found.dim() in (1, 2) and not found.is_floating_point()
    return found.reshape(-1, found.shape[-1]) if found is not None and whole else None


def _tokens(ids: Tensor | None, kwargs: Mapping[str, Any]) -> int:
    given = ids if ids is not None else kwargs.get(_EMBEDDINGS)
    return int(given.shape[1]) if isinstance(given, Tensor) and given.dim() > 1 else 0


def _with_past(ids: Tensor | None, kwargs: Mapping[str, Any]) -> tuple[int, Tensor | None]:
    """How many tokens are before those of the call, in its cache; and the ids of all, or None if not all are known."""
    cache = caches.of_call(kwargs)
    past = caches.length(cache)
    if ids is None or past == 0:
        return past, ids
    kept = _ids_in.get(cache)
    if kept is None or kept.shape[0] != ids.shape[0] or kept.shape[1] < past:
        before = ids.new_full((ids.shape[0], past), -1)  # no token has this id
    else:
        before = kept[:, :past].to(ids.device)
    return past, torch.cat([before, ids], dim=1)


def remember(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> None:
    """Keep the ids of a call whose tokens are in a cache now, for calls that go on from it."""
    cache = caches.of_outputs(outputs)
    ids = ids_of(args, kwargs)
    if cache is None or ids is None or torch.compiler.is_compiling():
        return
    past = caches.length(cache) - ids.shape[1]
    kept = _ids_in.get(cache)
    if past > 0:
        if kept is None or kept.shape[0] != ids.shape[0] or kept.shape[1] < past:
            return
        ids = torch.cat([kept[:, :past].to(ids.device), ids], dim=1)
    _ids_in[cache] = ids.detach().clone()


def remember_generated(outputs: Any) -> None:
    """The same of what `generate` returns, where it returns the cache."""
    cache = caches.of_outputs(outputs)
    if cache is not None:
        _ids_in[cache] = outputs["sequences"][:, : caches.length(cache)].detach().clone()


@contextmanager
def counting(model: nn.Module, gates: FromToken | None) -> Iterator[None]:
    """Within, which generates, each forward of the model says how many tokens it and its cache have."""
    if gates is None:
        yield
        return

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gates.window = _tokens(ids_of(args, kwargs), kwargs)
        gates.seen = gates.window + caches.length(caches.of_call(kwargs))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def beginning(session: Applied, gates: FromToken | None, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, where the open call has `gates`, each call of the session's model has its own: where adapters begin in its ids.
    Calls that are opened nearer to the model say so themselves."""
    if gates is None:
        yield
        return
    shared = session.shared
    around = shared.call

    def begun(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if shared.call is not around:
            return forward(*args, **kwargs)
        names = session.active if session.enabled else ()
        with shared.opened(Call(values=dict(values), gates=beginnings(session, names, values, args, kwargs))):
            outputs = forward(*args, **kwargs)
        remember(args, kwargs, outputs)
        return outputs

    with calls_replaced(session.model, begun):
        yield
