"""All or nothing: how things were is kept before they are changed, and an exception puts them back, newest first.

What is kept are states, not deeds: attributes, entries of dictionaries, tensors, so that it makes no difference where an
operation was cut off, and what is put back are the same objects. Putting back makes no tensor: it works without memory.

An operation is a function that is `whole`. What runs inside of it keeps things in the journal that is open, its own or that
of an operation further out, which undoes them too if it fails later. Without an open journal nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from functools import wraps
from threading import local
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from peftc.host.torch_modules import context_depth, leave_contexts

P = ParamSpec("P")
R = TypeVar("R")


class _Open(local):
    """The journal that is open in this thread: no operation awaits, so a thread has one at a time.

    No context variable: Python below 3.12 crashes if the collector runs while one is set, and what it collects sets one too,
    as the end of a `disable_adapter` block that was never left does.
    """

    journal: Journal | None = None


_open = _Open()

_ABSENT = object()


class Journal:
    """A context manager. Leaving it by any exception, an interrupt included, restores what was noted."""

    def __init__(self) -> None:
        self._undo: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._outer = _open.journal
        self._grad = torch.is_grad_enabled()
        self._depth = context_depth()

    def note(self, undo: Callable[..., Any], *args: Any) -> None:
        """Say how the next change is undone. It may be undone that was not made, or twice."""
        self._undo.append((undo, args))

    def __enter__(self) -> Self:
        _open.journal = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.undo(error)

    def close(self) -> None:
        """Leave what was done to whoever opened a journal before, or for good."""
        _open.journal = self._outer
        if self._outer is not None:
            self._outer._undo.extend(self._undo)

    def undo(self, error: BaseException) -> None:
        """Restore everything, whatever goes wrong meanwhile: that is told by a note on the error."""
        _open.journal = self._outer
        torch.set_grad_enabled(False)
        while self._undo:
            restore, args = self._undo[-1]
            for attempt in range(2):  # an interrupt is gone the second time
                try:
                    restore(*args)
                    break
                except BaseException as other:
                    if attempt:
                        error.add_note(f"Not all could be undone: {type(other).__name__}: {other}")
            self._undo.pop()
        # what changed these for a while may have been cut off before it could set them back
        torch.set_grad_enabled(self._grad)
        leave_contexts(self._depth)


def whole(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function an operation: it finishes, or what it kept is as before, up to the moment in which it returns."""

    @wraps(function)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        journal = Journal()
        try:
            journal.__enter__()
            result = function(*args, **kwargs)
            journal.close()
            return result  # in here, and nothing is called any more: an interrupt finds no gap
        except BaseException as error:
            journal.undo(error)
            raise

    return operation


# what can be kept -----------------------------------------------------------------------------------------------------


def note(undo: Callable[..., Any], *args: Any) -> None:
    """Say how the next change is undone. It may be undone that was not made, or twice."""
    journal = _open.journal
    if journal is not None:
        journal._undo.append((undo, args))


def keep(*things: Any) -> None:
    """Keep which objects the attributes of things are; not what is in them."""
    journal = _open.journal
    if journal is not None:
        for thing in things:
            journal._undo.append((_restore_attributes, (thing.__dict__, dict(thing.__dict__))))


def keep_entry(mapping: MutableMapping[Any, Any], key: Any) -> None:
    """Keep an entry that is to be added or replaced: what it is, or that there is none."""
    journal = _open.journal
    if journal is not None:
        journal._undo.append((_restore_entry, (mapping, key, mapping.get(key, _ABSENT))))


def keep_entries(*containers: MutableMapping[Any, Any] | list[Any] | set[Any]) -> None:
    """Keep all entries, and their order: for those that are to be taken out. Libraries have mappings of their own for tensors."""
    journal = _open.journal
    if journal is not None:
        for container in containers:
            before = container.copy() if isinstance(container, dict | list | set) else dict(container)
            journal._undo.append((_restore_entries, (container, before)))


def keep_trained(tensor: Tensor, trained: bool) -> None:
    """Make a tensor require gradients or not, and keep whether it did."""
    if tensor.requires_grad != trained:
        note(tensor.requires_grad_, not trained)
        tensor.requires_grad_(trained)


def keep_values(tensor: Tensor) -> None:
    """Keep a tensor's values, in a copy."""
    journal = _open.journal
    if journal is not None:
        held = tensor.detach()
        journal._undo.append((held.copy_, (held.clone(),)))


def keep_memory(tensor: Tensor) -> None:
    """Keep what memory a tensor has: for one that is to get other memory."""
    journal = _open.journal
    if journal is not None:
        journal._undo.append((setattr, (tensor, "data", tensor.data)))


def _restore_attributes(own: dict[str, Any], before: Mapping[str, Any]) -> None:
    own.update(before)
    for name in own.keys() - before.keys():
        del own[name]


def _restore_entry(mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    if value is _ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _restore_entries(container: Any, before: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)
