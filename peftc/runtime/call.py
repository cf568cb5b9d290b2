"""What one call of an adapted model knows: which adapter each row is for, and values by row that methods read.

A call is open in the thread that runs it. Activation checkpointing repeats part of it later, during backward and perhaps
in another thread: what is repeated sees the calls that were open when it ran first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.host.torch_modules import checkpoints_call
from peftc.runtime.gates import Gates

#: stands for the base model among the adapters of rows
BASE = "__base__"


@dataclass(frozen=True)
class Call:
    """One call. `adapters` names the adapter of each row, `BASE` for none; without any, the active ones are for all rows.
    `expand` is how often generation repeats each row (beams, several answers): what comes before the repetition, as an
    encoder, still has the rows as they were. `values` are what methods read of the call: keyword -> one value per row.
    `gates` multiply the updates of adapters."""

    adapters: tuple[str, ...] = ()
    expand: int = 1
    values: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    gates: Gates | None = field(default=None, compare=False)
    _indices: dict[tuple[int, torch.device], dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    _orders: dict[tuple[tuple[str, ...], int, torch.device], Tensor | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    def rows(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Adapter -> indices of its rows in a batch of `count`. Raises `PeftcError` if the call has not so many."""
        found = self._indices.get((count, device))
        if found is None:
            found = self._indices[count, device] = {
                name: torch.tensor(rows, device=device) for name, rows in self._places(count).items()
            }
        return found

    def widened(self, x: Tensor) -> Tensor:
        """What all rows share, such as positions, once for each row; anything else as it is."""
        shared = x.shape[0] == 1 and self.expand == 1
        return x.expand(len(self.adapters), *x.shape[1:]) if shared else x

    def order(self, adapters: tuple[str, ...], count: int, device: torch.device) -> Tensor | None:
        """Indices of the rows of some adapters, one after the other; None if those are all rows as they stand."""
        key = adapters, count, device
        if key not in self._orders:
            rows = self.rows(count, device)
            together = torch.cat([rows[name] for name in adapters])
            stands = together.tolist() == list(range(count))
            self._orders[key] = None if stands else together
        return self._orders[key]

    def value(self, name: str, count: int, device: torch.device) -> Tensor | None:
        """A value for each row of a batch of `count`, or None if the call does not give it. Raises `PeftcError` if it
        gives another number of them."""
        given = self.values.get(name)
        if given is None:
            return None
        times = count // max(1, given.shape[0])
        if times not in (1, self.expand) or times * given.shape[0] != count:
            raise PeftcError(values_differ(name, given.shape[0], count, "a layer gets"))
        given = given.to(device)
        return given if times == 1 else given.repeat_interleave(times, dim=0)

    def only(self, rows: Tensor, count: int) -> Call:
        """What the call gives for some rows of a batch of `count`."""
        own = {name: self.value(name, count, rows.device) for name in self.values}
        return Call(values={name: value[rows] for name, value in own.items() if value is not None})

    def _places(self, count: int) -> dict[str, list[int]]:
        times = count // max(1, len(self.adapters))
        if times not in (1, self.expand) or times * len(self.adapters) != count:
            raise PeftcError(rows_differ(len(self.adapters), count, "a layer gets"))
        places: dict[str, list[int]] = {}
        for row in range(count):
            places.setdefault(self.adapters[row // times], []).append(row)
        return places


def rows_differ(names: int, rows: int, who: str) -> Any:
    """The diagnostic for a batch of another size than the list of adapters."""
    what = f"There are {names} adapter names, but {who} {rows} row{'s' * (rows != 1)}"
    return rules.ROWS_DIFFER(what, fix=f"Name one adapter for each row, or `{BASE}` for the base model.")


def values_differ(name: str, values: int, rows: int, who: str) -> Any:
    """The diagnostic for a batch of another size than the values that were given for its rows."""
    what = f"`{name}` has {values} value{'s' * (values != 1)}, but {who} {rows} row{'s' * (rows != 1)}"
    return rules.ROW_VALUES(what, fix=f"Give `{name}` one value for each row of the batch.")


class Shared:
    """What the layers of one model have in common: which adapters are active, and the open call."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        #: whether any call has named adapters by row: only then do layers look for one
        self.by_rows = False
        #: whether any layer has merged since all were unmerged
        self.merges = False
        #: whether any adapter has been added whose start changes base weights
        self.rebases = False
        #: active adapters whose updates calls multiply: those that another weighs, and those that wait for a token
        self.gated: frozenset[str] = frozenset()
        #: the open call while a graph is traced, which is done in one thread and cannot look at context variables
        self._traced: Call | None = None

    @property
    def call(self) -> Call | None:
        """The call of this model that is open here, the innermost one."""
        if self._traced is not None and torch.compiler.is_compiling():
            return self._traced
        return next((call for shared, call in reversed(_OPEN.get()) if shared is self), None)

    @contextmanager
    def opened(self, call: Call) -> Iterator[None]:
        """Have a call open in this thread."""
        if torch.compiler.is_compiling():
            before, self._traced = self._traced, call
            try:
                yield
            finally:
                self._traced = before
            return
        checkpoints_call(_rebound)
        token = _OPEN.set((*_OPEN.get(), (self, call)))
        try:
            yield
        finally:
            _OPEN.reset(token)


_OPEN: ContextVar[Sequence[tuple[Shared, Call]]] = ContextVar("peftc_open_calls", default=())


def _rebound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, always run with the calls that are open now."""
    seen = _OPEN.get()
    if not seen:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _OPEN.set(seen)
        try:
            return function(*args, **kwargs)
        finally:
            _OPEN.reset(token)

    return run
