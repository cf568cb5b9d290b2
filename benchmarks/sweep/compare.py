"""Both sides of the sweep in one run, each in a process of its own, and what their rows have in common and have not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import FIXED
from benchmarks.row import OURS, PEER
from benchmarks.sweep.reasons import Difference, Reason, reasons_of
from benchmarks.sweep.side import read

ROOT = Path(__file__).resolve().parents[2]


class Relation(StrEnum):
    """How the outcomes of the two sides stand to each other."""

    SAME = "same"
    BOTH_REFUSE = "both refuse"
    OURS_ALONE = "ours alone"
    THEIRS_ALONE = "reference alone"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Compared:
    """One label on one type of model."""

    difference: Difference
    relation: Relation
    reasons: tuple[Reason, ...] = ()

    @property
    def is_explained(self) -> bool:
        return self.relation in (Relation.SAME, Relation.BOTH_REFUSE) or bool(self.reasons)


@dataclass(frozen=True)
class Sweep:
    """All that was compared, and the types that transformers does not build, with what it says."""

    compared: tuple[Compared, ...]
    failed: Mapping[str, str]

    @property
    def built(self) -> frozenset[str]:
        return frozenset(one.difference.model_type for one in self.compared)

    @property
    def unexplained(self) -> tuple[Compared, ...]:
        return tuple(one for one in self.compared if not one.is_explained)


def sweep(types: Collection[str]) -> Sweep:
    """Adapt the types with both libraries and compare. Raises `RuntimeError` when a process fails."""
    with TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.jsonl"), Path(folder, "theirs.jsonl")
        _run([OURS, str(ours)], types)
        _run([PEER, str(theirs), str(ours)], types)
        return compared(read(ours), read(theirs))


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Sweep:
    """What the rows of two files come to."""
    failed = {kind: row["error"] for kind, row in ours.items() if "error" in row}
    return Sweep(tuple(one for kind, row in ours.items() for one in _compared(row, theirs[kind])), failed)


def _compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Compared]:
    for label, outcome in ours["outcomes"].items():
        other = theirs["outcomes"].get(label, {"refused": "the model could not be built"})
        difference = Difference(ours["type"], label, outcome, other, ours.get("noted", {}))
        relation = _relation(outcome, other)
        differs = relation not in (Relation.SAME, Relation.BOTH_REFUSE)
        yield Compared(difference, relation, reasons_of(difference) if differs else ())


def _relation(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Relation:
    if "trained" not in ours:
        return Relation.THEIRS_ALONE if "trained" in theirs else Relation.BOTH_REFUSE
    if "trained" not in theirs:
        return Relation.OURS_ALONE
    return Relation.SAME if ours["trained"] == theirs["trained"] else Relation.DIFFERENT


def _run(words: Sequence[str], types: Collection[str]) -> None:
    argv = [sys.executable, "-m", "benchmarks.sweep.side", *words]
    environment = {**os.environ, **FIXED}
    run = subprocess.run(
        argv, cwd=ROOT, env=environment, input="\n".join(types), capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(f"{words[0]} failed:\n{run.stderr[-4000:]}")
