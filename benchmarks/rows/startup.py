"""Starting: importing the library and making a config, and the two commands that people run most."""

from __future__ import annotations

import sys

from benchmarks.measure import imported, whole_process
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target, Unit

COMMANDS = {"help": ["--help"], "validate": ["validate", "examples/quickstart/adapter.yaml"]}
HEAVY = ("torch", "transformers")


def _no_torch(command: str) -> Check:
    what = f"modules of {' and '.join(HEAVY)} that `peftc {' '.join(COMMANDS[command])}` imports"
    return Check(what, Reading(OURS, f"{command}_heavy"), target=Target(0), unit=Unit.NUMBER)


ROW = Row(
    title="Start",
    how="Whole processes, interpreter included: `python -c 'import LIBRARY; LIBRARY.LoraConfig()'`, and commands by "
    "`python -m peftc`. What they import is read from `-X importtime`.",
    sides=BOTH,
    checks=(
        Check(
            "`import` and a `LoraConfig`, whole process",
            Reading(OURS, "start"),
            Reading(PEER, "start"),
            Target(20, at_least=True),
        ),
        Check("`peftc --help`", Reading(OURS, "help"), target=Target(0.25)),
        Check("`peftc validate examples/quickstart/adapter.yaml`", Reading(OURS, "validate"), target=Target(0.5)),
        _no_torch("help"),
        _no_torch("validate"),
    ),
)


def measure(name: str) -> Readings:
    """Readings of one library; the commands are ours only."""
    readings = whole_process([sys.executable, "-c", f"import {name}; {name}.LoraConfig()"], "start")
    if name == OURS:
        for command, words in COMMANDS.items():
            argv = ["-m", "peftc", *words]
            readings |= whole_process([sys.executable, *argv], command)
            readings[f"{command}_heavy"] = imported(argv, HEAVY)
    return readings


if __name__ == "__main__":
    run(measure)
