"""How commands speak: results on stdout, everything else on stderr, colour only on a terminal and never with NO_COLOR.

Text that came from a file is printed with control characters escaped, so that no document can drive the terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from peftc.diagnostics import Diagnostic, Severity, and_more
from peftc.limits import MOST_SHOWN

if TYPE_CHECKING:
    from rich.console import Console

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_CONTROL = {c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether the stream (stdout) is a terminal that can be drawn on."""
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"


def has_color(stream: TextIO | None = None) -> bool:
    """Whether to colour: a terminal, and `NO_COLOR` unset or empty (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def width() -> int:
    """Columns to fill; 100 off a terminal, so that output does not depend on the machine."""
    return shutil.get_terminal_size((100, 24)).columns if is_terminal() else 100


def paint(text: str, *styles: str, stream: TextIO | None = None) -> str:
    """The text in the styles (`bold`, `dim`, `red`, `green`, `yellow`, `cyan`) if the stream (stdout) takes colour."""
    if not has_color(stream):
        return text
    return f"\x1b[{';'.join(_CODES[s] for s in styles)}m{text}\x1b[0m"


def plain(text: str) -> str:
    """The text with control characters, other than newline and tab, written as `\\x1b`."""
    return text.translate(_CONTROL)


def out(text: str = "") -> None:
    """A line of the command's result."""
    print(text)


def out_json(value: Any) -> None:
    """The command's result for `--json`: one object, two spaces, keys sorted."""
    print(json.dumps(value, indent=2, sort_keys=True))


def note(text: str, quiet: bool = False) -> None:
    """A line of progress on stderr; nothing with `--quiet`."""
    if not quiet:
        print(text, file=sys.stderr)


def show(diagnostics: Iterable[Diagnostic]) -> None:
    """Diagnostics on stderr, one block each; of very many the first and their number."""
    found = list(diagnostics)
    for diagnostic in found[:MOST_SHOWN]:
        color = "red" if diagnostic.severity is Severity.ERROR else "yellow"
        head, _, rest = plain(str(diagnostic)).partition("\n")
        label, _, what = head.partition(": ")
        print(f"{paint(label, 'bold', color, stream=sys.stderr)}: {what}", file=sys.stderr)
        if rest:
            print(rest, file=sys.stderr)
    if len(found) > MOST_SHOWN:
        print(and_more(found), file=sys.stderr)


def table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """Aligned columns, two spaces apart; the last column is as long as it is."""
    body = [[plain(cell) for cell in row] for row in rows]
    lines = [list(heads), *body] if heads else body
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    laid = ["  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip() for line in lines]
    if heads:
        laid[0] = paint(laid[0], "bold")
    return "\n".join(laid)


def rich_console(stderr: bool = False) -> Console:
    """A rich console with the same rules, for progress bars. Rich is imported here: most commands do without it."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, no_color=not has_color(stream), force_terminal=is_terminal(stream), highlight=False)
