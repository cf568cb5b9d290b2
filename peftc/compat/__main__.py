"""`python -m peftc.compat [-m] TARGET [ARGUMENT …]`: install the alias and run a script or a module as `__main__`.

What the program raises or exits with passes through, as if Python had started it.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from peftc import rules
from peftc.cli import console
from peftc.compat import install
from peftc.diagnostics import PeftcError, Where, did_you_mean


def prepare(words: list[str]) -> Callable[[], object]:
    """Install the alias, and give what runs the program that the words name. Raises `PeftcError` if there is none."""
    as_module = words[:1] == ["-m"]
    target, *arguments = words[1:] if as_module else words
    install()
    sys.argv = [target, *arguments]
    if as_module:
        _require_module(target)
        return partial(runpy.run_module, target, run_name="__main__", alter_sys=True)
    _require_file(Path(target))
    sys.path[0] = str(Path(target).parent.resolve())  # it was the current folder, because of `-m`
    return partial(runpy.run_path, target, run_name="__main__")


def _require_file(path: Path) -> None:
    if path.exists():
        return
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    fix = did_you_mean(path.name, beside) or "Check the path; a module needs `-m` before its name."
    raise PeftcError(rules.SCRIPT_MISSING(f"There is no file `{path}`", fix=fix, where=Where(file=str(path))))


def _require_module(name: str) -> None:
    try:
        there = find_spec(name) is not None
    except ModuleNotFoundError as error:
        if not name.startswith(f"{error.name}."):
            raise
        there = False
    if not there:
        fix = "Check the name; a script is named by its path, without `-m`."
        raise PeftcError(rules.SCRIPT_MISSING(f"There is no module `{name}`", fix=fix))


def main(words: list[str]) -> int:
    """Run the program. The exit code is 1 if it cannot be started."""
    if words in ([], ["-m"]):
        print("usage: python -m peftc.compat [-m] TARGET [ARGUMENT ...]", file=sys.stderr)
        return 2
    try:
        program = prepare(words)
    except PeftcError as error:
        console.show(error.diagnostics)
        return 1
    program()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
