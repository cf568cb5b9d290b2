"""What a problem looks like: one `Diagnostic` with a stable code, a place, and what to do about it.

Everything user-facing that can go wrong is a `Rule` in `peftc.rules`; calling the rule makes a diagnostic. Problems are
collected and raised together as one `PeftcError`, so that a document with five mistakes costs one run, not five.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, Self

from peftc.limits import MOST_SHOWN


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"  # stops the operation
    WARNING = "warning"  # is shown, and the operation goes on


@dataclass(frozen=True, slots=True)
class Where:
    """A place: a file position, a JSON path inside a document (`$.adapters.a.r`), a module path, or several of these."""

    file: str | None = None
    line: int | None = None
    column: int | None = None
    path: str | None = None

    def __str__(self) -> str:
        parts = [str(p) for p in (self.file, self.line, self.column) if p is not None]
        position = ":".join(parts)
        if self.path is None:
            return position
        return f"{position} at `{self.path}`" if position else f"`{self.path}`"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem. Made by calling its `Rule`."""

    #: never changes its meaning
    code: str
    #: whether it stops the operation
    severity: Severity
    #: what is wrong, without a full stop
    what: str
    #: why it matters, a sentence
    why: str
    #: what to do about it, sentences
    fix: str
    #: the place: a position in a file, a path in a document or of a module, or several of these
    where: Where = field(default_factory=Where)
    #: Python's own classes that the exception or warning with this problem also belongs to
    builtins: tuple[type[Exception], ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"{self.severity.value}[{self.code}]: {self.what}"]
        place = str(self.where)
        if place:
            lines.append(f"  where: {place}")
        if self.why:
            lines.append(f"  why:   {self.why}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Plain data for `--json`."""
        data = asdict(self)
        del data["builtins"]
        return data


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of problem, declared once, and called to make one (see `rules`).

    A plugin's own have a code that begins with something else than peftc's `PC`:
    `TOO_WIDE = Rule("SSF1", "Layer is too wide", "The vectors would not fit into the cache.")`.
    """

    #: never used for another meaning
    code: str
    #: heads its entry in the documentation
    title: str
    #: the reason that is given if a call gives no other
    why: str
    #: how bad it is, if a call says nothing else
    severity: Severity = Severity.ERROR
    #: Python's classes that an exception with it is also of: who catches those catches ours
    builtins: tuple[type[Exception], ...] = (ValueError,)

    def __call__(
        self,
        what: str,
        *,
        fix: str,
        where: Where | str | None = None,
        why: str | None = None,
        severity: Severity | None = None,
        also: type[Exception] | None = None,
    ) -> Diagnostic:
        """A diagnostic of this kind; a plain string as `where` is a module or JSON path.

        `also` is a further builtin class, such as that of the system's own error.
        """
        place = Where(path=where) if isinstance(where, str) else where or Where()
        bad = severity or self.severity
        kinds = self.builtins if also is None else (also, *self.builtins)
        kinds = tuple(kind for kind in kinds if issubclass(kind, Warning) == (bad is Severity.WARNING))
        return Diagnostic(self.code, bad, what, self.why if why is None else why, fix, place, kinds)


class PeftError(Exception):
    """The root of peftc's errors, under the name that users of the reference catch."""


class _Also:
    """An exception or warning that is also of builtin classes, as its diagnostics say."""

    #: the class that was asked for, which has a name that can be imported
    _plain: ClassVar[type]

    def __init_subclass__(cls) -> None:
        cls._plain = cls.__dict__.get("_plain", cls)


@cache
def _also(cls: Any, builtins: tuple[type[Exception], ...]) -> Any:
    """The class, made a subclass of those of the builtin ones that it is not one of; named like itself."""
    for kind in builtins:
        if not issubclass(cls, kind):
            names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_plain": cls._plain}
            with suppress(TypeError):  # two that Python lays out differently, as `OSError` and `ImportError`: the first
                cls = type(cls.__name__, (cls, kind), names)
    return cls


def _made(cls: Any, text: str) -> Any:
    """An instance with that text; made by the builtin class whose layout it has, as Python demands."""
    layout = cls
    while layout.__module__ != "builtins":
        layout = layout.__base__
    return layout.__new__(cls, text)


class PeftcError(_Also, PeftError):
    """Raised with every diagnostic found, errors and warnings alike; `str()` shows them all.

    It is also of each builtin class that the rules of its errors name: a `ValueError`, an `OSError`, or both at once.
    """

    #: everything that was found
    diagnostics: tuple[Diagnostic, ...]

    def __new__(cls, diagnostics: Iterable[Diagnostic] | Diagnostic) -> Self:
        found = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        kinds = dict.fromkeys(kind for d in found if d.severity is Severity.ERROR for kind in d.builtins)
        error: Self = _made(_also(cls, tuple(kinds)), render(found))  # type: ignore[arg-type]
        error.diagnostics = found
        return error

    def __init__(self, diagnostics: Iterable[Diagnostic] | Diagnostic) -> None:
        """All is set already: what is given may be an iterator, which is used up."""

    def __str__(self) -> str:
        return render(self.diagnostics)  # a builtin class may show its arguments in another way

    def __reduce__(self) -> tuple[type[Exception], tuple[tuple[Diagnostic, ...]]]:
        return self._plain, (self.diagnostics,)


class ConfigError(PeftcError, TypeError, ValueError):
    """A config that cannot be made. Also a `TypeError`: other libraries catch that for an unknown keyword."""


class MissingNameError(PeftcError, ImportError):
    """A public name of a method that cannot be loaded. Also an `ImportError`, which is what `from peftc import …` may raise."""


class NoMatchingPeftModuleError(PeftcError, ValueError):
    """An adapter that would be put on no module at all."""


class PeftWarning(UserWarning):
    """The root of peftc's warnings, under the name that users of the reference filter by."""


class PeftcWarning(_Also, PeftWarning):
    """A warning that carries its `Diagnostic`; where its rule says so, also a `RuntimeWarning` or the like."""

    diagnostic: Diagnostic

    def __new__(cls, diagnostic: Diagnostic) -> Self:
        warning: Self = _made(_also(cls, diagnostic.builtins), str(diagnostic))  # type: ignore[arg-type]
        warning.diagnostic = diagnostic
        warning.args = (
            diagnostic,
        )  # what it is made of: who carries warnings between processes makes it anew from these
        return warning

    def __init__(self, diagnostic: Diagnostic) -> None:
        """All is set already."""

    def __reduce__(self) -> tuple[type[Exception], tuple[Diagnostic]]:
        return self._plain, (self.diagnostic,)


class Collector:
    """Gathers diagnostics through an operation, so that all problems are reported at once."""

    def __init__(self) -> None:
        self._found: list[Diagnostic] = []

    def add(self, *diagnostics: Diagnostic) -> None:
        self._found.extend(diagnostics)

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        return tuple(d for d in self._found if d.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        return tuple(d for d in self._found if d.severity is Severity.WARNING)

    def raise_errors(self, error: type[PeftcError] = PeftcError) -> None:
        """Raise everything gathered if any of it is an error."""
        if self.errors:
            raise error(self._found)


def render(diagnostics: Iterable[Diagnostic]) -> str:
    """Plain text, one block per diagnostic; of very many the first and their number."""
    found = list(diagnostics)
    more = [and_more(found)] if len(found) > MOST_SHOWN else []
    return "\n".join([*map(str, found[:MOST_SHOWN]), *more])


def and_more(found: Sized) -> str:
    """The line after those that are shown."""
    return f"… and {len(found) - MOST_SHOWN:,} more"


def warn(diagnostics: Iterable[Diagnostic]) -> None:
    """Show warnings through Python's warning machinery (each is a `PeftcWarning`), placed at the line that called peftc."""
    for diagnostic in diagnostics:
        warnings.warn(PeftcWarning(diagnostic), stacklevel=_frames_of_ours() + 1)


def _frames_of_ours() -> int:
    """How many frames lie between the code that called into peftc and the caller of this function."""
    depth, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("peftc", "contextlib"):
        depth, frame = depth + 1, frame.f_back
    return depth


def nearest(name: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """The candidates most like `name`, best first; empty when none is close."""
    return difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=limit, cutoff=0.6)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A sentence naming the nearest candidates, or an empty string."""
    close = nearest(name, candidates)
    return f"Did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""
