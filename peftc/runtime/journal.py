"""All or nothing: each change is noted with its undoing before it is made, and an exception undoes them, newest first."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Journal:
    """A context manager. Leaving it by any exception, an interrupt included, restores what was noted."""

    def __init__(self) -> None:
        self._undo: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def note(self, undo: Callable[..., Any], *args: Any) -> None:
        """Say how the next change is undone."""
        self._undo.append((undo, args))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            while self._undo:
                undo, args = self._undo.pop()
                undo(*args)
