"""How commands show that they are at work: a bar on a terminal, a few plain lines off it, nothing with `--quiet`.

Everything goes to stderr. `Stage` is one piece of work that takes time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from peftc.cli import console
from peftc.compiler.plan.render import size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Lines that one stage prints off a terminal, beside the first and the last step.
_LINES = 10


class Stage(Protocol):
    """Work in progress. `at` says how many of the announced pieces are done, and a word about the last one."""

    def at(self, done: int, note: str = "") -> None: ...


@contextmanager
def stage(label: str, total: int | None = None, quiet: bool = False, sizes: bool = False) -> Iterator[Stage]:
    """Show work: `total` pieces of it, or None where it cannot be counted. Pieces that are bytes are shown as `sizes`, with the
    time that is left."""
    sys.stdout.flush()  # in a log that takes both streams, what was said before stands before
    if quiet:
        yield _Silent()
    elif console.is_terminal(sys.stderr):
        with _bar(total, sizes) as bar:
            yield _Drawn(bar, bar.add_task(label, total=total, note=""))
    else:
        start = time.monotonic()
        count = str if not sizes else size
        print(f"{label} …" if total is None else f"{label}, {count(total)} in all …", file=sys.stderr, flush=True)
        yield _Sizes(total, start) if sizes and total is not None else _Lines(total)
        print(f"{label}: done in {seconds(time.monotonic() - start)}", file=sys.stderr, flush=True)


def seconds(value: float) -> str:
    """A duration for people: `8.4 s`, `1 min 24 s`."""
    return f"{value:.1f} s" if value < 60 else f"{int(value) // 60} min {int(value) % 60:02d} s"


class _Silent:
    def at(self, done: int, note: str = "") -> None:
        """Say nothing."""


class _Lines:
    def __init__(self, total: int | None) -> None:
        self._total = total
        self._told = 0

    def at(self, done: int, note: str = "") -> None:
        if self._total is None:
            return
        tenth = done * _LINES // self._total
        if tenth > self._told or done == 1:
            self._told = tenth
            print(f"  {done:>{len(str(self._total))}}/{self._total}  {note}".rstrip(), file=sys.stderr, flush=True)


class _Sizes:
    def __init__(self, total: int, start: float) -> None:
        self._total, self._start = total, start
        self._told = 0

    def at(self, done: int, note: str = "") -> None:
        tenth = done * _LINES // max(self._total, 1)
        if self._told < tenth < _LINES:
            self._told = tenth
            left = (time.monotonic() - self._start) * (self._total - done) / done
            print(f"  {size(done)} of {size(self._total)}, {seconds(left)} left", file=sys.stderr, flush=True)


class _Drawn:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def at(self, done: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done, note=note)


def _bar(total: int | None, sizes: bool = False) -> Progress:
    from rich import progress

    label = progress.TextColumn("{task.description}")
    columns: list[progress.ProgressColumn]
    if total is None:
        columns = [label, progress.SpinnerColumn("line"), progress.TimeElapsedColumn()]
    elif sizes:
        columns = [label, progress.BarColumn(30), progress.DownloadColumn(), progress.TimeRemainingColumn()]
    else:
        columns = [label, progress.BarColumn(30), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()]
    return progress.Progress(
        *columns, progress.TextColumn("{task.fields[note]}"), console=console.rich_console(stderr=True)
    )
