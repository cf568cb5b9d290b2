"""How a document comes off the disk: a regular file, not too large, UTF-8, without control characters, YAML or JSON.

Everything is checked before the parser sees it; size before anything is read. What is refused is told with its place.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from peftc import rules
from peftc.config.places import Document
from peftc.diagnostics import Collector, Diagnostic, PeftcError, Where, did_you_mean
from peftc.limits import MAX_JSON, MAX_YAML

# What YAML 1.2 does not call printable (section 5.1), and a byte order mark inside the text.
_CONTROL = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x84\\x86-\\x9f\\ufeff\\ufffe\\uffff]")
_SHOWN = 5


def read_document(path: str | os.PathLike[str]) -> Document:
    """The document in a file: JSON if the name ends in `.json`, else YAML. Raises `PeftcError` with all problems."""
    file = os.fspath(path)
    if file.endswith(".json"):
        from peftc.config.json_text import parse_json

        return parse_json(read_text(file, MAX_JSON), file)
    from peftc.config.yaml_text import parse_yaml

    return parse_yaml(read_text(file, MAX_YAML), file)


def read_text(file: str, limit: int) -> str:
    """The text of a file of at most `limit` bytes. Raises `PeftcError` (unreadable, too large, not text)."""
    return _decode(read_bytes(file, limit), file)


def read_bytes(file: str, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises `PeftcError` (unreadable, not a file, too large)."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could wait for ever
            raise PeftcError(_not_a_file(file, status.st_mode))
        if status.st_size > limit:
            raise PeftcError(_too_large(file, status.st_size, limit))
        with open(file, "rb") as stream:
            raw = stream.read(limit + 1)
    except PeftcError:  # may be an `OSError` or a `ValueError` itself
        raise
    except OSError as error:
        raise PeftcError(_unreadable(file, error)) from None
    except ValueError:  # a NUL in the name
        raise PeftcError(
            rules.UNREADABLE("The file name contains a NUL", fix="Correct it.", where=Where(file))
        ) from None
    if len(raw) > limit:
        raise PeftcError(_too_large(file, len(raw), limit))
    return raw


def _decode(raw: bytes, file: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = len(raw[raw.rfind(b"\n", 0, error.start) + 1 : error.start].decode(errors="replace")) + 1
        what = f"The file is not UTF-8: byte 0x{raw[error.start]:02x}"
        raise PeftcError(rules.SYNTAX(what, fix="Save it as UTF-8.", where=Where(file, line, column))) from None
    found = Collector()
    for match in _CONTROL.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        column = match.start() - text.rfind("\n", 0, match.start())
        what = f"Control character U+{ord(match[0]):04X}"
        found.add(rules.SYNTAX(what, fix="Remove it, or write it as an escape.", where=Where(file, line, column)))
        if len(found) == _SHOWN:
            break
    found.raise_errors()
    return text


def _not_a_file(file: str, mode: int) -> Diagnostic:
    kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
    return rules.UNREADABLE(f"`{file}` is {kind}", fix="Name a file.", where=Where(file))


def _too_large(file: str, size: int, limit: int) -> Diagnostic:
    what = f"`{file}` has {size / 2**20:,.1f} MiB; at most {limit / 2**20:,.0f} MiB are read"
    return rules.TOO_LARGE(what, fix="Check that this is the right file.", where=Where(file))


def _unreadable(file: str, error: OSError) -> Diagnostic:
    fix = "Check the path and its permissions."
    if isinstance(error, FileNotFoundError):
        fix = did_you_mean(Path(file).name, _siblings(Path(file))) or "Check the path."
    what = f"`{file}` cannot be read: {error.strerror or error}"
    return rules.UNREADABLE(what, fix=fix, where=Where(file), also=type(error))


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(path.parent)][:1000]
    except OSError:
        return []
