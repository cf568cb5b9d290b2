"""A layer's forward when rows of the batch are for different adapters: the base layer runs once for all of them.

Each method acts on its rows by the lowering it would use anyway; thin updates of all adapters become one grouped product.
Only a method that can do nothing but change parameters has the base layer run again for its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.ops.grouped import grouped_low_rank
from peftc.runtime.call import Call, Shared
from peftc.runtime.layer.gated import update_of
from peftc.runtime.layer.parts import Part, Path, Under
from peftc.runtime.layer.paths import (
    change_of_input,
    change_of_output,
    exchange_of_vectors,
    has_functional_form,
    through_parameters,
    update_beside,
    update_of_thin,
)
from peftc.runtime.layer.stored import reader_of

#: an adapter's part in a layer, and the indices of its rows
Group = tuple[Part, Tensor]
#: what gives the factors of an adapter now
Readers = dict[str, Callable[[], tuple[Tensor, Tensor, float]]]


def by_rows(plain: Path, shared: Shared, under: Under, parts: Mapping[str, Part]) -> Path:
    """The plain path, but while a call is open that names adapters by row, those in effect on theirs."""
    readers: Readers = {}

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = shared.call
        if call is None or not call.adapters:
            return plain(x, *args, **kwargs)
        return _grouped(shared, call, under, parts, readers, x, args, kwargs)

    return run


def _grouped(
    shared: Shared,
    call: Call,
    under: Under,
    parts: Mapping[str, Part],
    readers: Readers,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    if parts.keys().isdisjoint(call.adapters):
        return under.base(x, *args, **kwargs)  # type: ignore[no-any-return]  # as every layer's
    x = call.widened(x)
    rows = call.rows(x.shape[0], x.device)
    groups = [(parts[name], index) for name, index in rows.items() if name in parts]
    if not under.backend.is_map:
        return _each_whole(under, groups, (x, *args), kwargs)
    beside = [group for group in groups if has_functional_form(group[0].tuner, under.backend)]
    thin = [group for group in beside if "thin" in group[0].tuner.lowerings and not group[0].tuner.waits]
    own = partial(_rows_only, shared, call, x.shape[0])
    y: Tensor = under.base(_mapped(x, beside, "input", lambda part: change_of_input(under, part), own), *args, **kwargs)
    if thin:
        y = _fused(call, y, x, thin, readers) if under.backend.is_plain_linear else _each_thin(y, x, under, thin)
    for part, index in beside:
        if part.tuner.waits:
            gate = 0.0 if call.gates is None else call.gates.of(part.path, part.view.adapter, y[index])
            if isinstance(gate, Tensor):
                with own(part, index):
                    y = _added(y, index, update_of(under, part)(x[index], y[index]) * gate)
        elif _by_branch(part):
            with own(part, index):
                y = _added(y, index, update_beside(under, part)(x[index], y[index]))
        elif "vectors" in part.tuner.lowerings:
            y = y.index_copy(0, index, exchange_of_vectors(under, part)(x[index], y[index]))
    y = _mapped(y, beside, "output", lambda part: change_of_output(under, part), own)
    for part, index in groups:
        if not has_functional_form(part.tuner, under.backend):
            y = y.index_copy(0, index, through_parameters(under, [part], (x[index], *args), kwargs))
    return y


def _each_whole(under: Under, groups: Sequence[Group], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """A layer of no known kind gets the whole batch for each adapter: other arguments, and layers in it, go by rows too."""
    y: Tensor = under.base(*args, **kwargs)
    if not isinstance(y, Tensor):
        what = f"A {type(under.inner).__name__} returns a {type(y).__name__}, whose rows cannot be put together"
        raise PeftcError(rules.ROWS_DIFFER(what, fix="Call the model once for each adapter.", where=groups[0][0].path))
    for part, index in groups:
        y = y.index_copy(0, index, through_parameters(under, [part], args, kwargs)[index])
    return y


def _rows_only(shared: Shared, call: Call, count: int, part: Part, index: Tensor) -> AbstractContextManager[None]:
    """Where a method that reads values of the call finds those of its rows."""
    return shared.opened(call.only(index, count)) if part.tuner.keywords else nullcontext()


def _mapped(
    x: Tensor,
    groups: Sequence[Group],
    name: str,
    change_of: Callable[[Part], Callable[[Tensor], Tensor]],
    own: Callable[[Part, Tensor], AbstractContextManager[None]],
) -> Tensor:
    """The rows of methods that act by a map of the input, or of the output, mapped."""
    for part, index in groups:
        given = part.tuner.lowerings
        if name in given and not given & {"thin", "rescaled", "branch"}:
            with own(part, index):
                x = x.index_copy(0, index, change_of(part)(x[index]))
    return x


def _by_branch(part: Part) -> bool:
    return bool(part.tuner.lowerings & {"rescaled", "branch"}) and "thin" not in part.tuner.lowerings


def _fused(call: Call, y: Tensor, x: Tensor, groups: Sequence[Group], readers: Readers) -> Tensor:
    counts = [index.shape[0] for _, index in groups]
    order = call.order(tuple(part.view.adapter for part, _ in groups), x.shape[0], x.device)
    own = x if order is None else x[order]
    if any(part.dropout is not None for part, _ in groups):
        pieces = zip(groups, own.split(counts), strict=True)
        own = torch.cat([rows if part.dropout is None else part.dropout(rows) for (part, _), rows in pieces])
    for part, _ in groups:
        if part.view.adapter not in readers:
            readers[part.view.adapter] = reader_of(part)
    update = grouped_low_rank(own, [readers[part.view.adapter]() for part, _ in groups], counts)
    return (y + update).to(y.dtype) if order is None else _added(y, order, update)


def _each_thin(y: Tensor, x: Tensor, under: Under, groups: Sequence[Group]) -> Tensor:
    for part, index in groups:
        y = _added(y, index, update_of_thin(under, part)(x[index]))
    return y


def _added(y: Tensor, index: Tensor, update: Tensor) -> Tensor:
    """Updates added to some rows, and rounded once."""
    return y.index_copy(0, index, (y[index] + update).to(y.dtype))
