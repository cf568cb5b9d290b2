"""Runs the examples on a page and puts their real output where the page shows it.

A ```console block has `$ command` lines, each followed by its output. A ```python block followed by a ```text block is run
in one namespace for the whole page, and the text is what it printed. Both run in the repository's root. A ```yaml block
after the comment `file: PATH` is that file.
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
BLOCK = re.compile(
    r"```console\n(?P<console>.*?)```"
    r"|```python\n(?P<python>[^`]*?)```\n\n```text\n.*?```"
    r"|<!-- file: (?P<file>\S+) -->\n```yaml\n.*?```",
    re.DOTALL,
)
PLAIN = {"NO_COLOR": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def with_output(page: str) -> str:
    """The page with the output of all its examples renewed. Raises `RuntimeError` if an example cannot run."""
    namespace: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(PLAIN, SCRATCH=scratch)

        def renewed(block: re.Match[str]) -> str:
            if block["console"] is not None:
                commands = re.findall(r"^\$ (.*)$", block["console"], re.MULTILINE)
                return "```console\n" + "\n".join(map(_ran, commands)) + "```"
            if block["file"] is not None:
                return (
                    f"<!-- file: {block['file']} -->\n```yaml\n{(ROOT / block['file']).read_text(encoding='utf-8')}```"
                )
            return f"```python\n{block['python']}```\n\n```text\n{_printed(block['python'], namespace)}```"

        return BLOCK.sub(renewed, page)


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
