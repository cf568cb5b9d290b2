"""Runs one script as a job of two processes, once with the real `peft` and then with peftc under that name.

The two find each other through a file, so no port has to be free; what one of them waits for in vain ends both.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.ecosystem.both import ALIAS, REAL, RUN, SCRIPTS, Both, environment

RANKS = 2
LIMIT = 200.0  # seconds for a job; far more than it needs


def run_jobs(script: str, folder: Path) -> Both:
    """Both jobs, one after the other. Raises `AssertionError` with the end of its output if one fails."""
    both = Both(folder / "real", folder / "alias")
    _job(both.real, REAL + RUN, script, "peft")
    _job(both.alias, ALIAS + RUN, script, "peftc")
    return both


def _job(folder: Path, code: str, script: str, library: str) -> None:
    folder.mkdir(parents=True)
    meeting = folder.with_name(f"{folder.name}-meeting")
    meeting.mkdir()
    logs = [meeting / f"rank{rank}.txt" for rank in range(RANKS)]
    runs = [_start(folder, meeting, rank, code, script, log) for rank, log in enumerate(logs)]
    try:
        end = time.monotonic() + LIMIT
        while any(run.poll() is None for run in runs) and time.monotonic() < end:
            if any(run.poll() for run in runs):  # who has failed is waited for by the other
                time.sleep(1.0)
                break
            time.sleep(0.1)
        codes = [run.poll() for run in runs]
        told = "\n".join(f"rank {rank}, {codes[rank]}:\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
        assert codes == [0] * RANKS, f"{script} with {library}:\n{told}"
        assert all(log.read_text().rsplit(maxsplit=1)[-1] == library for log in logs), told
    finally:
        for run in runs:
            run.kill()
            run.wait()


def _start(folder: Path, meeting: Path, rank: int, code: str, script: str, log: Path) -> subprocess.Popen[bytes]:
    """One of the processes. What a launcher would set is for accelerate and DeepSpeed; the script takes the file."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": 0}
    launched = {**{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "localhost"}
    here = {**environment(), **launched, "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
    here.pop("PEFTC_TRACE", None)
    with log.open("wb") as out:
        command = [sys.executable, "-W", "ignore", "-c", code, str(SCRIPTS / script), str(meeting / "store"), str(rank)]
        return subprocess.Popen(command, cwd=folder, env=here, stdout=out, stderr=subprocess.STDOUT)
