"""Runs the examples on a page and puts their real output where the page shows it.

A ```console block has `$ command` lines, each followed by its output. ```python blocks run in one namespace for the whole
page, unless a line `...` says that it is a sketch; a ```text block after one is what it printed. All run in the repository's
root. A ```yaml block after the comment `file: PATH` is that file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?P<file><!-- file: (?P<path>\S+) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```", re.DOTALL)
PLAIN = {"NO_COLOR": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def with_output(page: str) -> str:
    """The page with the output of all its examples renewed. Raises `RuntimeError` if an example cannot run."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(PLAIN, SCRATCH=scratch)
        return BLOCK.sub(_Renewal(), page)


class _Renewal:
    """Gives one block after the other its new text."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {}
        self.printed: str | None = None

    def __call__(self, block: re.Match[str]) -> str:
        body, printed, self.printed = block["body"], self.printed, None
        if block["kind"] == "console":
            body = "\n".join(map(_ran, re.findall(r"^\$ (.*)$", body, re.MULTILINE)))
        elif block["kind"] == "python" and "\n...\n" not in body:
            self.printed = _printed(body, self.namespace)
        elif block["kind"] == "text" and printed is not None:
            body = printed
        elif block["file"]:
            body = (ROOT / block["path"]).read_text(encoding="utf-8")
        return f"{block['file'] or ''}```{block['kind']}\n{body}```"


def _ran(command: str) -> str:
    words = shlex.split(os.path.expandvars(command), comments=True)
    if words[0] == "peftc":
        words[:1] = [sys.executable, "-m", "peftc"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode > 1 or "Traceback" in run.stderr:
        raise RuntimeError(f"`{command}` failed:\n{run.stdout}{run.stderr}")
    return f"$ {command}\n{_tidy(run.stdout + run.stderr)}"


def _printed(code: str, namespace: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
        exec(compile(code, "example", "exec"), namespace)
    return _tidy(out.getvalue())


def _tidy(output: str) -> str:
    """No trailing blanks, no folder of this machine."""
    text = output.replace(os.environ["SCRATCH"], "$SCRATCH").replace(f"{ROOT}{os.sep}", "")
    return "".join(f"{line.rstrip()}\n" for line in text.strip("\n").splitlines())
