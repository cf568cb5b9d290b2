"""The plugin of pytest in the process of the reference's tests: restricts them to a list, and logs what each came to.

Environment: `PEER_SUITE`, the folder that holds `tests/`; `PEER_LOG`, the file of results, a line of JSON for each test;
`PEER_SELECT`, a file with the tests to run, one a line; `PEER_ALIAS`, set where `peft` is to be peftc's alias.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peer_suite.inside import standins

#: Longest text that is kept of an error, and how many places of its traceback.
_TEXT, _PLACES = 700, 14
#: Folders of what runs tests: not where an error comes from.
_RUNNERS = {"_pytest", "pluggy"}
_ROOT = os.environ["PEER_SUITE"]
_ALIAS = bool(os.environ.get("PEER_ALIAS"))

sys.path.insert(0, _ROOT)  # before the root of this repository, which has a folder `tests` too
if _ALIAS:
    standins.install()  # before anything imports peft


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of upstream's `conftest.py`, which is not in the source distribution."""
    parser.addoption("--regression", action="store_true", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Log where the results arrive; make the tests importable where they run."""
    config.addinivalue_line("markers", "skipf: a slip of the pen upstream")
    if not hasattr(config, "workerinput") and os.environ.get("PEER_LOG"):
        config.pluginmanager.register(_Log(Path(os.environ["PEER_LOG"])), "peer_log")
    if not config.getoption("numprocesses", None):  # a worker, or a run without workers
        _keep_online()
        standins.take_used()


def _keep_online() -> None:
    """The tests switch the hub off after the first use of each model, so that results would depend on their order."""
    importlib.import_module(f"{standins.SUITE}.testing_utils").hub_online_once = _as_it_is


@contextlib.contextmanager
def _as_it_is(model_id: str) -> Iterator[None]:
    yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the chosen tests alone."""
    for item in items:
        if "regression" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="compares with files of former releases, which are on the hub"))
    if os.environ.get("PEER_SELECT"):
        chosen = set(Path(os.environ["PEER_SELECT"]).read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Leave with each test what it used of what is not here, the class of its error, and where that came from."""
    if call.excinfo is not None and call.when != "teardown":
        entries = [(Path(entry.path), entry.name) for entry in call.excinfo.traceback]
        places = [f"{path.name}:{name}" for path, name in entries if not _RUNNERS & set(path.parts)]
        item.user_properties.append(("raised", call.excinfo.type.__name__))
        item.user_properties.append(("trace", places[-_PLACES:]))
    if call.when == "teardown" and _ALIAS:
        item.user_properties.append(("used", standins.take_used()))


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """From here on a use of a stand-in counts."""
    standins.running(True)


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    """What follows is the harness again."""
    standins.running(False)


class _Log:
    """In the process that sees all reports: a line for each test, when it is over."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", encoding="utf-8", buffering=1)
        self._open: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """What a phase of a test came to. A worker that crashed reports the phase `???`."""
        row = self._open.setdefault(report.nodeid, {"outcome": "", "seconds": 0.0, "why": ""})
        row["seconds"] += report.duration
        expected = hasattr(report, "wasxfail")
        if report.skipped:
            row["outcome"] = "xfailed" if expected else "skipped"
        elif report.failed:
            row["outcome"] = "error" if report.when in ("setup", "teardown") else "failed"
            row["why"] = _text_of(report.longrepr)[:_TEXT]
        elif report.when == "call":
            row["outcome"] = "xpassed" if expected else "passed"
        if report.when not in ("setup", "call"):
            done = self._open.pop(report.nodeid)
            more = {key: value for key, value in report.user_properties if key in ("used", "raised", "trace")}
            self._write({"id": report.nodeid, **done, "outcome": done["outcome"] or "error", **more})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._write({"id": report.nodeid, "outcome": "not collected", "why": _text_of(report.longrepr)[-_TEXT:]})

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


def _text_of(report: Any) -> str:
    crash = getattr(report, "reprcrash", None)
    return str(report) if crash is None else f"{Path(crash.path).name}: {crash.message}"
