"""What a class of layers calls its input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def first_argument(forward: Callable[..., Any]) -> str:
    """What a class of layers calls its input, for calls by keyword."""
    names = iter(inspect.signature(forward).parameters)
    next(names)
    return next(names, "")
