"""A row: a script that measures one thing for one side, and the checks that compare the sides.

`python -m benchmarks.rows.NAME SIDE_ARGUMENTS` prints readings as JSON; the harness calls it in alternation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.table import Check, Readings

OURS = "peftc"
PEER = "peft"


@dataclass(frozen=True)
class Row:
    """What a script in `benchmarks/rows` measures.

    `how` explains the measurement to readers of the page. `sides` are the arguments of the script by name of the side;
    they run in this order, once per round. `rounds` is how often by default.
    """

    title: str
    how: str
    checks: tuple[Check, ...]
    sides: Mapping[str, tuple[str, ...]]
    rounds: int = 5


#: The two libraries, each measured by the same lines.
BOTH: Mapping[str, tuple[str, ...]] = {OURS: (OURS,), PEER: (PEER,)}


def run(measure: Callable[..., Readings]) -> None:
    """Call `measure` with the arguments of the process and print what it returns as the last line of output."""
    readings = measure(*sys.argv[1:])
    print(f"\n{json.dumps(dict(readings))}", flush=True)
