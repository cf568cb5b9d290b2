"""JSON with the mistakes that Python's parser lets through: duplicate keys, NaN and deep nesting are reported.

Python's parser gives the data and the verdict. Positions are found by a second look at the text, and only when a
diagnostic needs one: valid files cost nothing more.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from peftc import rules
from peftc.config.places import Document, Location, Position, Positions, json_path
from peftc.diagnostics import Collector, Diagnostic, Where
from peftc.limits import MAX_DEPTH, MAX_INTEGER

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)
_INTEGER = re.compile(r"-?[0-9]+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_OPEN, _CLOSE = frozenset("{["), frozenset("}]")


def parse_json(text: str, file: str) -> Document:
    """The document in the text. Raises `PeftcError` with a syntax error, or with every duplicate key and NaN."""
    found = Collector()
    too_deep = _too_deep(text)
    if too_deep is not None:
        fix = f"Nest at most {MAX_DEPTH} levels."
        found.add(rules.TOO_LARGE("Nesting is too deep", fix=fix, where=Where(file, *_position(text, too_deep))))
        found.raise_errors()
    hook = _Hook(suspicious=bool(_SURROGATE.search(text)))
    try:
        data = json.loads(
            text, object_pairs_hook=hook.pairs, parse_constant=hook.constant, parse_float=hook.float, parse_int=hook.int
        )
    except json.JSONDecodeError as error:
        where = Where(file, error.lineno, error.colno)
        found.add(rules.SYNTAX(f"Not valid JSON: {error.msg}", fix="Correct the text at this place.", where=where))
        found.raise_errors()
    if hook.suspicious:
        _report(text, file, found)
        found.raise_errors()
    return Document(file, data, lambda: locate(text))


class _Hook:
    """Notes whether anything needs the second look; numbers are made as Python's parser would."""

    def __init__(self, suspicious: bool) -> None:
        self.suspicious = suspicious

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        self.suspicious |= len(data) != len(pairs)
        return data

    def constant(self, name: str) -> float:
        self.suspicious = True
        return math.nan

    def float(self, text: str) -> float:
        value = float(text)
        self.suspicious |= not math.isfinite(value)
        return value

    def int(self, text: str) -> int:
        if is_beyond(text):
            self.suspicious = True
            return 0
        return int(text)


def locate(text: str) -> Positions:
    """Positions of all keys and values of a text that is valid JSON."""
    lines = _Lines(text)
    positions = Positions()
    for location, offset, is_key, _ in _walk(text):
        (positions.keys if is_key else positions.values).setdefault(location, lines.position(offset))
    return positions


def _report(text: str, file: str, found: Collector) -> None:
    """Every duplicate key, every number that is none, every half of a surrogate pair."""
    lines = _Lines(text)
    first: dict[Location, int] = {}
    for location, offset, is_key, token in _walk(text):
        where = Where(file, *lines.position(offset), path=json_path(location))
        if token[0] == '"' and has_surrogate(json.loads(token)):
            what = "Half of a surrogate pair is not a character"
            found.add(rules.SYNTAX(what, fix="Correct the escape.", where=where))
        if is_key:
            if location in first:
                line = lines.position(first[location])[0]
                fix = f"Keep one of them; the first is on line {line}."
                found.add(rules.DUPLICATE_KEY(f"`{location[-1]}` is given twice", fix=fix, where=where))
            first.setdefault(location, offset)
        elif _INTEGER.fullmatch(token):
            if is_beyond(token):
                found.add(beyond(token, where))
        elif _is_not_finite(token):
            found.add(rules.NOT_FINITE(f"`{token[:40]}` is not a finite number", fix="Give a number.", where=where))


def has_surrogate(text: str) -> bool:
    """Whether the text has half of a surrogate pair, which no file can hold."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def is_beyond(digits: str, base: int = 10) -> bool:
    """Whether a whole number, given by its digits, is beyond what a file can say."""
    return len(digits) > 70 or abs(int(digits, base)) > MAX_INTEGER  # 70: 64 binary ones, a sign and a prefix


def beyond(digits: str, where: Where) -> Diagnostic:
    """The diagnostic for such a number."""
    shown = f"`{digits}`" if len(digits) < 40 else f"A number of {len(digits):,} digits"
    fix = f"Give a number of at most {MAX_INTEGER:,}."
    return rules.NUMBER_BEYOND(f"{shown} does not fit into 64 bits", fix=fix, where=where)


def _is_not_finite(token: str) -> bool:
    if token in ("NaN", "Infinity", "-Infinity"):
        return True
    return token[0] in "-0123456789" and not math.isfinite(float(token))


def _walk(text: str) -> Iterator[tuple[Location, int, bool, str]]:
    """`(location, offset, is it a key, token)` of every key and value, in the order of the text."""
    stack: list[Location] = []  # location of the value expected next, in each open container; () + index in a list
    here: Location = ()
    expect_key = False
    for match in _TOKEN.finditer(text):
        token, offset = match[0], match.start()
        if token in _OPEN:
            yield here, offset, False, token
            stack.append(here)
            expect_key = token == "{"
            here = here if expect_key else (*here, 0)
        elif token in _CLOSE:
            here = stack.pop()
            expect_key = False
        elif token == ",":
            parent = stack[-1]
            last = here[-1] if len(here) > len(parent) else None
            expect_key = not isinstance(last, int)
            here = parent if expect_key else (*parent, int(last or 0) + 1)
        elif token == ":":
            expect_key = False
        elif expect_key:
            here = (*stack[-1], json.loads(token))
            yield here, offset, True, token
        else:
            yield here, offset, False, token


def _too_deep(text: str) -> int | None:
    """Offset of the bracket that opens one level too many."""
    depth = 0
    for match in _TOKEN.finditer(text):
        if match[0] in _OPEN:
            depth += 1
            if depth > MAX_DEPTH:
                return match.start()
        elif match[0] in _CLOSE:
            depth -= 1
    return None


class _Lines:
    """Offsets to lines and columns."""

    def __init__(self, text: str) -> None:
        self._starts = [0, *(m.end() for m in re.finditer("\n", text))]

    def position(self, offset: int) -> Position:
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1


def _position(text: str, offset: int) -> Position:
    return _Lines(text).position(offset)
