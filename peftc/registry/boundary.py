"""The plugin boundary: the one place where any exception of a method's own code becomes a diagnostic.

Everything that calls a function of a plugin does so inside `boundary`, so that a user sees which plugin, which function
and which module, and a caller can collect the problem like any other.
"""

from __future__ import annotations

import os
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

    A `PeftcError` passes through: the plugin has said itself what is wrong. A plugin that would end the process is told of
    like any other, but for functions of a running training, in which the end may have been asked for by a signal. Running
    out of memory is not its doing.
    """
    try:
        yield
    except PeftcError:
        raise
    except BaseException as error:
        if is_of_user(error) or is_out_of_memory(error) or (function in _RUNNING and not isinstance(error, Exception)):
            raise
        raise _raised(peft_type, function, path, error) from error


#: Functions that are called all through a training.
_RUNNING = frozenset({"on_step", "loss"})


def is_of_user(error: BaseException) -> bool:
    """Whether it is no failure: the user's interrupt, or a generator that is closed."""
    return isinstance(error, (KeyboardInterrupt, GeneratorExit))


def guarded(function: Callable[P, R], peft_type: str, path: str | None, kind: type[object] = object) -> Callable[P, R]:
    """The same for a function that is called in every forward: it costs nothing until it raises, or gives a value that is
    not of that kind.

    Running out of memory is not the plugin's doing, and callers react to that exception by type; nor are the private
    exceptions that torch steers by.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            found = function(*args, **kwargs)
        except PeftcError:
            raise
        except Exception as error:
            if is_out_of_memory(error) or _control_flow(error):
                raise
            raise _raised(peft_type, function.__name__, path, error) from error
        if isinstance(found, kind):
            return found
        what = f"`{function.__name__}` of {peft_type} gives a `{type(found).__name__}`, not a `{kind.__name__}`"
        raise PeftcError(rules.PLUGIN_INVALID(what, fix="Correct what the plugin's function returns.", where=path))

    return call


def _raised(peft_type: str, function: str, path: str | None, error: BaseException) -> PeftcError:
    what = f"`{function}` of {peft_type} raised {type(error).__name__}: {error}".rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.name == function]
    if frames and _is_core(frames[-1]) and own:  # the method called what is ours, and that failed
        fix = (
            f"It was raised in peftc, at {_place(frames[-1])}, called from {_place(own[-1])}. Look whether something else"
            " holds the adapter's tensors, such as a parametrisation, pruning or sharding; if not, report it to peftc."
        )
    elif frames:
        fix = f"Report it to the plugin's authors, with the line that raised: {_place(own[-1] if own else frames[-1])}"
    else:
        fix = "Report it to the plugin's authors."
    return PeftcError(rules.PLUGIN_RAISED(what, fix=fix, where=path))


#: The folder of peftc's own code, bundled methods not among it.
_CORE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def _is_core(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_CORE) and not frame.filename.startswith(f"{_CORE}testing{os.sep}")


def _place(frame: traceback.FrameSummary) -> str:
    """A line as a person finds it; a collected problem is shown without a traceback."""
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which says nothing of what was computed: callers react to it by its type. torch raises errors
    of several types for it, `RuntimeError` among them."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _control_flow(error: Exception) -> bool:
    """Whether torch raised it to stop a computation, as gradient checkpointing does once it has recomputed enough."""
    cls = type(error)
    return cls.__name__.startswith("_") and cls.__module__.startswith("torch.")
