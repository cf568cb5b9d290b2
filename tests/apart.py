"""Pieces of code that each run as in a fresh interpreter, for the price of starting one: in forks of a process that has imported
no more than what is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

_RUNNER = """
import importlib, json, os, sys, tempfile, traceback

for name in sys.argv[1:]:
    importlib.import_module(name)
pieces, found = json.load(sys.stdin), {}
for name, code in pieces.items():
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = 0
            try:
                exec(compile(code, name, "exec"), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        found[name] = [status, out.read().decode(), err.read().decode()]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Ran:
    """How a piece ended, and what it wrote."""

    code: int
    out: str
    err: str


def run_apart(pieces: Mapping[str, str], *imported: str) -> dict[str, Ran]:
    """Run each piece by itself. Modules `imported` are there from the start, for all of them."""
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, *imported],
        input=json.dumps(dict(pieces)),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Ran(*ran) for name, ran in found.items()}
