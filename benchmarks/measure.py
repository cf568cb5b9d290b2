"""What row scripts measure with: a stopwatch, whole processes, and the library under test.

Light on import: torch and transformers only inside functions, so that a whole process can be measured from here.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

#: One thread, so that CPU time is comparable; nothing fetched; fixed hash seed, so that runs repeat.
FIXED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONHASHSEED": "0"}


@dataclass
class Watch:
    """Seconds that a block took: CPU (user and system) and wall."""

    cpu: float = 0.0
    wall: float = 0.0

    def readings(self, metric: str, calls: int = 1) -> dict[str, float]:
        """Per call, as the table reads them."""
        return {f"{metric}_cpu": self.cpu / calls, f"{metric}_wall": self.wall / calls}


@contextmanager
def timed() -> Iterator[Watch]:
    """Time a block of code."""
    watch = Watch()
    cpu, wall = time.process_time(), time.perf_counter()
    yield watch
    watch.cpu, watch.wall = time.process_time() - cpu, time.perf_counter() - wall


def whole_process(argv: Sequence[str], metric: str, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Seconds and peak resident bytes (`<metric>_peak`) of a process from start to exit.

    Raises `RuntimeError` with its error output when it fails.
    """
    wall = time.perf_counter()
    process = subprocess.Popen(
        argv, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - wall
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} exited with {process.returncode}:\n{errors}")
    watch = Watch(usage.ru_utime + usage.ru_stime, wall)
    return {**watch.readings(metric), f"{metric}_peak": usage.ru_maxrss * 1024.0}


def imported(argv: Sequence[str], modules: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """How many of these top-level modules a Python process (`argv` after the interpreter) imports."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *argv],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    return len(names & set(modules))


def library(name: str) -> ModuleType:
    """The library under test, with torch held to one thread and seeded."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return importlib.import_module(name)


def paired(base: Callable[[], object], adapted: Callable[[], object], calls: int, warm_up: int) -> dict[str, float]:
    """Call both in turn: median seconds of `base` and `adapted`, and `extra`, the median of the differences."""
    for _ in range(warm_up):
        base()
        adapted()
    pairs = []
    for _ in range(calls):
        pairs.append((_seconds(base), _seconds(adapted)))
    readings: dict[str, float] = {}
    for clock, suffix in enumerate(("cpu", "wall")):
        readings[f"base_{suffix}"] = statistics.median(one[clock] for one, _ in pairs)
        readings[f"adapted_{suffix}"] = statistics.median(two[clock] for _, two in pairs)
        readings[f"extra_{suffix}"] = statistics.median(two[clock] - one[clock] for one, two in pairs)
    return readings


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall
