"""A failure at one place of a run: at the n-th call that peftc makes, or on the n-th line that it executes.

Calls are those of Python and of C alike, made by code that has a live model in its hands: what lies above the torch line
has none, and neither have other libraries that were not given one by peftc.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import peftc

_HOME = Path(peftc.__file__).resolve().parent
#: Folders of peftc whose code has models in its hands.
_BELOW = tuple(f"{_HOME / name}/" for name in ("runtime", "model", "checkpoint", "ops", "host", "integrations"))
_METHODS = f"{_HOME.parent / 'plugins'}/"


#: Code, and the instruction in it.
Place = tuple[CodeType, int]


class Injected(Exception):
    """What no code expects."""


#: What may be raised anywhere: an error, the memory that ran out, an interrupt.
FAILURES: tuple[type[BaseException], ...] = (Injected, KeyboardInterrupt, torch.OutOfMemoryError, MemoryError)


class Fault:
    """Counts places; at the `n`-th it raises `failure`, once."""

    def __init__(self, n: int = 0, failure: type[BaseException] = Injected) -> None:
        self.n = n
        self.failure = failure
        self.count = 0
        self.where = ""
        #: where in the code each place is, of a run without failure
        self.places: list[Place] = []

    def reach(self, frame: FrameType) -> None:
        """One more place. Raises what was asked for."""
        self.count += 1
        if self.count == self.n:
            sys.setprofile(None)
            sys.settrace(None)
            self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
            raise self.failure("injected")
        if not self.n:
            self.places.append((frame.f_code, frame.f_lasti))

    def on_call(self, frame: FrameType, event: str, arg: Any) -> None:
        """For `sys.setprofile`."""
        if event == "c_call":
            if is_ours(frame.f_code):
                self.reach(frame)
        elif event == "call" and frame.f_back is not None and is_ours(frame.f_back.f_code):
            self.reach(frame.f_back)

    def on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        """For `sys.settrace`."""
        if event == "line":
            self.reach(frame)
        return self.on_line if is_ours(frame.f_code) else None


@cache
def is_ours(code: CodeType) -> bool:
    """Whether code of peftc or of a bundled method has models in its hands."""
    return code.co_filename.startswith((*_BELOW, _METHODS))


@contextmanager
def calls(fault: Fault) -> Iterator[Fault]:
    """Have the fault at a call."""
    sys.setprofile(fault.on_call)
    try:
        yield fault
    finally:
        sys.setprofile(None)


@contextmanager
def lines(fault: Fault) -> Iterator[Fault]:
    """Have the fault on a line."""
    sys.settrace(fault.on_line)
    try:
        yield fault
    finally:
        sys.settrace(None)
