"""The short form of `python -m tests.fuzz`, the same cases at every run; and that a case which ends badly is noticed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peftc import rules
from peftc.diagnostics import PeftcError
from tests.fuzz import runner
from tests.fuzz.entries import entries
from tests.fuzz.runner import TOLD, Bad, Entry, Outcome, command, run_case

#: Cases of an entry of weight 1.
EACH = 12
SEED = 0
NAMES = ("validate", "plan", "inspect", "load", "data", "plan file", "graph file", "cache", "python", "base")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Entry]]:
    """All entries by name. Their examples are made once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("fuzz")
        patch.setenv("PEFTC_CACHE", str(folder / "cache"))  # put back after the entries have set it
        yield {entry.name: entry for entry in entries(folder)}


@pytest.mark.parametrize("name", NAMES)
def test_damage_ends_in_a_result_or_a_diagnostic(name: str, known: dict[str, Entry], tmp_path: Path) -> None:
    outcome, entry = Outcome(), known[name]
    for number in range(EACH * entry.weight):
        run_case(entry, SEED, number, tmp_path, outcome)
    assert outcome.bad == {}, f"python -m tests.fuzz --seed {SEED} --only '{name}' --case N"
    assert outcome.told > 0, "nothing was damaged"


def test_every_entry_is_run(known: dict[str, Entry]) -> None:
    assert tuple(known) == NAMES


def refused() -> None:
    raise PeftcError(rules.BAD_VALUE("x", fix="y"))


def swallowed() -> None:
    try:
        while True:
            time.process_time()
    except BaseException as error:  # as a boundary does
        raise PeftcError(rules.BAD_VALUE(str(error), fix="y")) from error


def busy() -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("act", "bad"),
    [
        (refused, ""),
        (lambda: TOLD, ""),
        (lambda: {}["key"], "KeyError at"),
        (lambda: exit(3), "SystemExit at"),
        (swallowed, "hang: stopped"),
        (busy, "slow: more than"),
        (lambda: command("no-such-command"), "Bad at no line of ours: exit code 2"),
    ],
)
def test_what_a_case_comes_to(act: Callable[[], object], bad: str, tmp_path: Path) -> None:
    outcome = Outcome()
    run_case(Entry("own", lambda rng, place: act, 1, seconds=0.2, hang=0.6), 0, 7, tmp_path, outcome)
    assert [(kind.startswith(bad), numbers) for kind, numbers in outcome.bad.items()] == ([(True, [7])] if bad else [])
    assert outcome.told == (not bad or bad == "hang: stopped")


def test_a_command_that_says_nothing_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "main", lambda words: 1)
    with pytest.raises(Bad, match="without a diagnostic"):
        command("validate")


def test_a_case_depends_on_entry_seed_and_number_alone(tmp_path: Path) -> None:
    drawn: list[float] = []

    def prepare(rng: random.Random, place: Path) -> Callable[[], object]:
        drawn.append(rng.random())
        return lambda: None

    for number in (3, 4, 3):
        run_case(Entry("own", prepare, 1), 5, number, tmp_path, Outcome())
    assert drawn[0] == drawn[2] != drawn[1]
