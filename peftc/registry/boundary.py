"""The plugin boundary: the one place where any exception of a method's own code becomes a diagnostic.

Everything that calls a function of a plugin does so inside `boundary`, so that a user sees which plugin, which function
and which module, and a caller can collect the problem like any other.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from peftc import rules
from peftc.diagnostics import PeftcError

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def boundary(peft_type: str, function: str, path: str | None = None) -> Iterator[None]:
    """Calls of `function` of the method `peft_type`, for the module at `path`. Raises `PeftcError` for any exception.

    A `PeftcError` passes through: the plugin has said itself what is wrong.
    """
    try:
        yield
    except PeftcError:
        raise
    except Exception as error:
        raise _raised(peft_type, function, path, error) from error


def guarded(function: Callable[P, R], peft_type: str, path: str | None) -> Callable[P, R]:
    """The same for a function that is called in every forward: it costs nothing until it raises.

    Running out of memory is not the plugin's doing, and callers react to that exception by type; nor are the private
    exceptions that torch steers by.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except PeftcError:
            raise
        except Exception as error:
            if _out_of_memory(error) or _control_flow(error):
                raise
            raise _raised(peft_type, function.__name__, path, error) from error

    return call


def _raised(peft_type: str, function: str, path: str | None, error: Exception) -> PeftcError:
    what = f"`{function}` of {peft_type} raised {type(error).__name__}: {error}"
    line = _line(function, error)
    told = f"with the line that raised: {line}" if line else "with the traceback above this error"
    fix = f"Report it to the plugin's authors, {told}"
    return PeftcError(rules.PLUGIN_RAISED(what, fix=fix, where=path))


def _line(function: str, error: Exception) -> str:
    """Where in the plugin's function it was raised; a collected problem is shown without a traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == function]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _control_flow(error: Exception) -> bool:
    """Whether torch raised it to stop a computation, as gradient checkpointing does once it has recomputed enough."""
    cls = type(error)
    return cls.__name__.startswith("_") and cls.__module__.startswith("torch.")
