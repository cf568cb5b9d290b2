"""Runs chosen tests of the reference in processes of their own, on the reference itself or on the alias."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peer_suite.hub.server import serve
from benchmarks.peer_suite.hub.write import DATASETS, hub_in
from benchmarks.peer_suite.record import PASSED
from benchmarks.peer_suite.source import ACCELERATOR, FOLDER, suite

ROOT = Path(__file__).resolve().parents[2]
#: Seconds after which a test is given up.
PATIENCE = 240
#: A test that was not found: its file cannot be imported, or its parameters have other names here.
MISSING = "missing"
# Upstream turns transformers' warnings of things to come into errors, which says whether the reference has caught up with
# the installed release, and nothing of peftc.
_WARNINGS = ("default::FutureWarning", "default::DeprecationWarning", "ignore::pytest.PytestUnknownMarkWarning")


@dataclass(frozen=True)
class Row:
    """What one test came to, and of one that did not pass why: the error, where it came from, what was used of stand-ins."""

    test: str
    outcome: str
    why: str = ""
    raised: str = ""
    trace: tuple[str, ...] = ()
    used: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED

    @property
    def text(self) -> str:
        """All of it as lines, which causes are looked for in."""
        lines = [self.test, f"{self.outcome} {self.raised}: {self.why}", f"trace {' > '.join(self.trace)}"]
        return "\n".join([*lines, *(f"used {name}" for name in self.used)])


def run(tests: Sequence[str], label: str, *, alias: bool, workers: int, resume: bool = False) -> dict[str, Row]:
    """Run the tests, all that there are if none is named; a row for each. Their log goes on where it was, with `resume`."""
    folder = FOLDER / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{label}.jsonl"
    if not resume:
        log.unlink(missing_ok=True)
    done = _rows(log)
    todo = [test for test in tests if test not in done]
    if todo or not tests:
        select = folder / f"{label}.select"
        select.write_text("".join(f"{test}\n" for test in todo), encoding="utf-8")
        environment = {**_environment(alias), "PEER_LOG": str(log)}
        if tests:
            environment["PEER_SELECT"] = str(select)
        with (folder / f"{label}.out").open("w", encoding="utf-8") as out:
            command = _command(_files(todo), workers)
            subprocess.run(command, cwd=hub_in(FOLDER) / DATASETS, env=environment, stdout=out, stderr=out, check=False)
    done = _rows(log)
    return {test: done.get(test, Row(test, MISSING)) for test in tests or done}


def not_collected(label: str) -> dict[str, str]:
    """Files of tests that could not be imported in the run of that name, and why."""
    rows = _lines(FOLDER / "runs" / f"{label}.jsonl")
    return {row["id"]: row["why"] for row in rows if row["outcome"] == "not collected"}


def _files(tests: Iterable[str]) -> list[str]:
    named = {test.partition("::")[0] for test in tests}
    every = sorted(file for file in (suite() / "tests").glob("test_*.py") if file.name not in ACCELERATOR)
    return [str(file) for file in every if not named or f"tests/{file.name}" in named]


def _command(files: Sequence[str], workers: int) -> list[str]:
    root = suite()
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.peer_suite.inside.plugin"]
    own = ["-c", str(root / "pyproject.toml"), "--rootdir", str(root), "-o", "addopts=", "-q", "--no-header"]
    how = ["-n", str(workers), f"--timeout={PATIENCE}", "--tb=no", "--continue-on-collection-errors"]
    warnings = [word for text in _WARNINGS for word in ("-W", text)]
    return [sys.executable, "-m", "pytest", *own, *plugins, *how, *warnings, *files]


def _environment(alias: bool) -> dict[str, str]:
    """All that the tests ask of the hub goes to a server in this process; nothing leaves the machine."""
    hub = hub_in(FOLDER)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))},
        **{"PEER_SUITE": str(suite()), "PEER_ALIAS": "1" if alias else "", "PYTHONPATH": os.pathsep.join(paths)},
        **{"HF_HOME": str(FOLDER / "home"), "HF_HUB_CACHE": str(hub), "HF_ENDPOINT": serve(hub)},
        **{"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "1"},
        **{"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    }


def _rows(log: Path) -> dict[str, Row]:
    found = {}
    for line in _lines(log):
        if line["outcome"] != "not collected":
            told = {name: tuple(line.get(name, ())) for name in ("trace", "used")}
            row = Row(line["id"], line["outcome"], line["why"], line.get("raised", ""), **told)
            found[row.test] = row
    return found


def _lines(log: Path) -> list[Mapping[str, str]]:
    if not log.exists():
        return []
    texts = log.read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in texts if text.endswith("}")]  # the last line of a killed run may be cut short
