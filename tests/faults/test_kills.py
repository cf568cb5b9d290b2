"""Work on folders that is killed at a random moment leaves the old folder or the new one, and the next save tidies up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import killing

#: How often each is killed: over 200 times together.
TIMES = {"save": 90, "several": 60, "merge": 30, "patch": 30, "convert": 30, "train": 8}


def found(root: Path, task: str, times: int) -> dict[str, Any]:
    """In a process of its own, which forks."""
    command = [sys.executable, killing.__file__, task, str(times), "7"]
    settings = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged on Linux")
@pytest.mark.parametrize("task", TIMES)
def test_killed_at_random(root: Path, task: str) -> None:
    result = found(root, task, TIMES[task])
    assert result["wrong"] == []
    assert result["left"] <= 1  # in any folder: the next one there removes what a dead one has left
    assert result["rest"] == 0
    assert result["kills"] > TIMES[task] / 6, "hardly any was still at work: this shows nothing"
