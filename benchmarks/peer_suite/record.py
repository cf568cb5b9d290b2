"""What the tests came to, as files of the tree: on the reference (`baseline.json.gz`) and here (`record.json.gz`)."""

from __future__ import annotations

import gzip
import json
import platform
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BASELINE, RECORD = HERE / "baseline.json.gz", HERE / "record.json.gz"
PASSED = "passed"
_BESIDE = ("torch", "transformers", "diffusers", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Recorded:
    """State of each test by its id, and when and on what it was seen."""

    states: Mapping[str, str]
    date: str
    python: str
    versions: Mapping[str, str]


def now(states: Mapping[str, str]) -> Recorded:
    """What was seen today, in this environment."""
    versions = {name: metadata.version(name).partition("+")[0] for name in _BESIDE}
    return Recorded(states, datetime.now(UTC).date().isoformat(), platform.python_version(), versions)


def read(file: Path) -> Recorded:
    """What a file holds."""
    data = json.loads(gzip.decompress(file.read_bytes()))
    return Recorded(_unpacked(data["tests"]), data["date"], data["python"], data["versions"])


def write(recorded: Recorded, file: Path) -> None:
    """Write it, the same bytes for the same record."""
    data = {
        "date": recorded.date,
        "python": recorded.python,
        "versions": dict(recorded.versions),
        "tests": _packed(recorded.states),
    }
    file.write_bytes(gzip.compress(json.dumps(data, sort_keys=True).encode(), mtime=0))


def function_of(test: str) -> str:
    """A test's id without its parameters."""
    return test.partition("[")[0]


def _packed(states: Mapping[str, str]) -> dict[str, Any]:
    """Tens of thousands of ids are some hundred functions with the same lists of parameters over and over."""
    by_function: dict[str, dict[str, str]] = defaultdict(dict)
    for test, state in sorted(states.items()):
        function = function_of(test)
        by_function[function][test.removeprefix(function)] = state
    lists: dict[tuple[str, ...], int] = {}
    functions: dict[str, Any] = {}
    for function, found in by_function.items():
        at: dict[str, list[int]] = defaultdict(list)
        for position, state in enumerate(found.values()):
            at[state].append(position)
        number = lists.setdefault(tuple(found), len(lists))
        functions[function] = [number, next(iter(at)) if len(at) == 1 else at]
    return {"parameters": list(map(list, lists)), "functions": functions}


def _unpacked(packed: Mapping[str, Any]) -> dict[str, str]:
    states: dict[str, str] = {}
    for function, (number, held) in packed["functions"].items():
        parameters = packed["parameters"][number]
        if isinstance(held, str):
            states.update((function + parameter, held) for parameter in parameters)
        else:
            states.update((function + parameters[at], state) for state, places in held.items() for at in places)
    return states
