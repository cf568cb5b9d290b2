"""The plugin boundary: the one place where any exception of a method's own code becomes a diagnostic.

Everything that calls a function of a plugin does so inside `boundary`, so that a user sees which plugin, which function
and which module, and a caller can collect the problem like any other. Whose an exception is follows from its traceback: the
last frame that is no library's is the plugin's, or peftc's own.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import ParamSpec, TypeVar

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.tuner.views import NoSlot

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
        raise _raised(peft_type, function, path, error, frames=2) from error


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
            raise _raised(peft_type, function.__name__, path, error, frames=1) from error
        if isinstance(found, kind):
            return found
        what = f"`{function.__name__}` of {peft_type} gives a `{type(found).__name__}`, not a `{kind.__name__}`"
        raise PeftcError(rules.PLUGIN_INVALID(what, fix="Correct what the plugin's function returns.", where=path))

    return call


class _Owner(Enum):
    """Whose code a frame runs. What the kit and libraries do they do for those who called them."""

    PLUGIN = auto()
    CORE = auto()
    LIBRARY = auto()


#: Packages whose code runs for who calls it.
_LIBRARIES = sys.stdlib_module_names.union(
    ("pluggy", "pydantic", "pydantic_core", "ruamel", "regex", "jsonschema"),
    ("torch", "numpy", "safetensors", "transformers", "tokenizers", "accelerate", "huggingface_hub"),
)
#: Python's words for a call that does not fit what is called.
_MISCALLED = re.compile(r"\S+\(\) (takes|missing|got) ")


@dataclass(frozen=True)
class _Frame:
    """One line that an exception passed: whose it is, the package that it is of, and where it stands."""

    owner: _Owner
    package: str
    at: traceback.FrameSummary

    def __str__(self) -> str:
        """The line as a person finds it; a collected problem is shown without a traceback."""
        return f"{self.at.filename}:{self.at.lineno}: {self.at.line}"


def _raised(peft_type: str, function: str, path: str | None, error: BaseException, frames: int) -> PeftcError:
    """What is told of an exception; the first so many frames that it passed are of the boundary and of who called there."""
    told = f"{type(error).__name__}: {error}".rstrip(": ")
    passed = _frames(error)
    ours = [frame for frame in passed if frame.owner is not _Owner.LIBRARY]
    plugins = [frame for frame in ours if frame.owner is _Owner.PLUGIN]
    if not ours or ours[-1].owner is _Owner.PLUGIN or (plugins and isinstance(error, NoSlot)):
        return PeftcError(_of_plugin(peft_type, function, path, told, plugins or passed))
    if not plugins and _does_not_fit(error, passed, ours, frames):
        what = f"`{function}` of {peft_type} takes other arguments, or gives something else, than it should: {told}"
        return PeftcError(rules.PLUGIN_INVALID(what, fix=f"Correct the plugin's `{function}`.", where=path))
    return PeftcError(_of_core(peft_type, function, path, told, ours[-1], plugins))


def line_that_raised(error: BaseException) -> str:
    """The line of a plugin's own code that raised, as a person finds it; empty if none of it was run."""
    plugins = [frame for frame in _frames(error) if frame.owner is _Owner.PLUGIN]
    return str(plugins[-1]) if plugins else ""


def _frames(error: BaseException) -> list[_Frame]:
    """What the exception passed on its way to the boundary, the boundary first."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = traceback.extract_tb(error.__traceback__)
    return [_Frame(_owner(name), name.partition(".")[0], at) for name, at in zip(names, places, strict=True)]


def _owner(module: str) -> _Owner:
    package = module.partition(".")[0]
    if package in _LIBRARIES or f"{module}.".startswith("peftc.testing."):
        return _Owner.LIBRARY
    return _Owner.CORE if package == "peftc" else _Owner.PLUGIN


def _does_not_fit(error: BaseException, passed: Sequence[_Frame], ours: Sequence[_Frame], callers: int) -> bool:
    """Whether it was raised by the line that calls the plugin's function and takes its answer, of which neither fits."""
    return passed[-1] is ours[-1] and (
        len(passed) <= callers or (isinstance(error, TypeError) and _MISCALLED.match(str(error)) is not None)
    )


def _of_plugin(peft_type: str, function: str, path: str | None, told: str, frames: Sequence[_Frame]) -> Diagnostic:
    """That the method's own code failed; the line is the last of the package whose function was called."""
    what = f"`{function}` of {peft_type} raised {told}"
    own = [frame for frame in frames if frame.package == frames[0].package]
    fix = f"Report it to the plugin's authors, with the line that raised: {own[-1]}" if own else ""
    return rules.PLUGIN_RAISED(what, fix=fix or "Report it to the plugin's authors.", where=path)


def _of_core(
    peft_type: str, function: str, path: str | None, told: str, at: _Frame, plugins: Sequence[_Frame]
) -> Diagnostic:
    """That peftc failed at what it did for the method."""
    called = f", called from {plugins[-1]}" if plugins else ""
    fix = (
        f"It was raised in peftc, at {at}{called}. Look whether something else holds the adapter's tensors, such as a"
        " parametrisation, pruning or sharding; if not, report it to peftc."
    )
    return rules.CORE_RAISED(f"Around `{function}` of {peft_type} peftc raised {told}", fix=fix, where=path)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which says nothing of what was computed: callers react to it by its type. torch raises errors
    of several types for it, `RuntimeError` among them."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _control_flow(error: Exception) -> bool:
    """Whether torch raised it to stop a computation, as gradient checkpointing does once it has recomputed enough."""
    cls = type(error)
    return cls.__name__.startswith("_") and cls.__module__.startswith("torch.")
