"""One case under a limit of time, and what came of many: in-process, so that a hundred thousand are a matter of hours."""

from __future__ import annotations

import contextlib
import io
import json
import random
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from peftc.cli.main import main
from peftc.diagnostics import PeftcError

#: A case: given its generator of numbers and a folder, what is to be done, prepared.
Prepare = Callable[[random.Random, Path], Callable[[], object]]
#: What a case gives that was refused with diagnostics.
TOLD = object()
#: Seconds that a case may wait for something that does not come.
PATIENCE = 60.0


@dataclass(frozen=True)
class Entry:
    """A way into peftc. `weight` is its share of the cases; `seconds` of computing are granted to one, `hang` is where it is
    stopped."""

    name: str
    prepare: Prepare
    weight: int
    seconds: float = 1.0
    hang: float = 30.0


class Bad(Exception):
    """A case that ended in a way that is none."""


class _Stopped(BaseException):
    """The limit of a case."""


@dataclass
class Outcome:
    """What came of the cases of one entry. `bad` has the kinds of failure, each with the numbers of cases."""

    cases: int = 0
    told: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    bad: dict[str, list[int]] = field(default_factory=dict)


def run_case(entry: Entry, seed: int, number: int, place: Path, outcome: Outcome) -> None:
    """Run one case, which depends on nothing but entry, seed and number."""
    rng = random.Random(f"{entry.name} {seed} {number}")
    act = entry.prepare(rng, place)
    outcome.cases += 1
    start = time.process_time()
    kind = ""
    with _limited(entry.hang) as stopped, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outcome.told += act() is TOLD
        except PeftcError as error:
            outcome.told += 1
            outcome.codes.update(diagnostic.code for diagnostic in error.diagnostics)
            str(error)
        except KeyboardInterrupt:
            raise
        except RuntimeError as error:
            # a tensor that a plan may well name and this machine cannot hold: callers react to that exception by its type
            kind = "" if "can't allocate memory" in str(error) else _where(error)
        except BaseException as error:
            kind = _where(error)
    took = time.process_time() - start
    outcome.seconds += took
    outcome.slowest = max(outcome.slowest, took)
    if stopped:
        kind = f"hang: stopped after {entry.hang:g} s of computing or {PATIENCE:g} s of waiting"
    elif not kind and took > entry.seconds:
        kind = f"slow: more than {entry.seconds:g} s of computing"
    if kind:
        outcome.bad.setdefault(kind, []).append(number)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[list[int]]:
    """Stop what is inside after so much computing, or after `PATIENCE`. The list has something in it then."""
    stopped: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.append(signum)
        raise _Stopped

    before = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1.0)
    try:
        yield stopped
    except _Stopped:
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def _where(error: BaseException) -> str:
    """The kind of a failure: what was raised, by which line of ours."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/peftc/" in f.filename or "/plugins/" in f.filename
    ]
    line = f"{'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno}" if frames else "no line of ours"
    return f"{type(error).__name__} at {line}: {str(error).splitlines()[0][:100] if str(error) else ''}"


def command(*words: object) -> object:
    """Run a command; `TOLD` if it refused with diagnostics. Raises `Bad` for an end without a result and without a word."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code == 1 and "--json" in words:
        json.loads(out.getvalue())
    elif code == 1 and "error[PC" not in err.getvalue() + out.getvalue():
        raise Bad(f"exit code 1 without a diagnostic: {err.getvalue()[:60]!r}")
    elif code not in (0, 1):
        raise Bad(f"exit code {code}")
    return TOLD if code else None
