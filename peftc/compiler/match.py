"""Which paths a target description means: pure string work, with the reference's semantics and no graph in sight.

A list matches a full path or a suffix at a dot, a string is a regular expression over the full path, a pattern key matches
the end of a path. Everything is linear in the number of paths, and no pattern from a file can hang the process.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from peftc import rules
from peftc.config.places import json_path
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import suffixes
from peftc.limits import DEADLINE, MAX_PATTERN, MAX_REPEATS

if TYPE_CHECKING:
    import regex

ALL_LINEAR = "all-linear"

_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
#: A brace that `re` takes literally but the other engine reads as fuzzy matching.
_LITERAL_BRACE = re.compile(r"(?<!\\)\{(?!\d+(?:,\d*)?\}|,\d*\})")
#: Keys without any special character but the dot.
_PLAIN_KEY = re.compile(r"[\w.]+").fullmatch


def is_all_linear(targets: object) -> bool:
    """Whether the targets are the shorthand for every linear layer, in any case."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


class Names:
    """A list of names: finds those that a path matches, in time independent of their number."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._last = frozenset(name.rpartition(".")[2] for name in self._names)

    def find(self, path: str) -> tuple[str, ...]:
        """The names that mean this path, the longest first; a full path is the only one equal to it."""
        if path.rpartition(".")[2] not in self._last:
            return ()
        return tuple(suffix for suffix in suffixes(path) if suffix in self._names)


class Deadline:
    """The time that the patterns of one pass have together."""

    def __init__(self, seconds: float = DEADLINE) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, at least a moment: an engine without a positive limit would not stop at all."""
        return max(self._end - time.monotonic(), 1e-6)


class Pattern:
    """A regular expression as `re` understands it, that stops at a deadline. Raises `PeftcError` if it is not valid."""

    def __init__(self, text: str, deadline: Deadline, where: str, prefix: str = "", suffix: str = "") -> None:
        self._text, self._where, self._deadline = text, where, deadline
        self._compiled = _compiled(text, where, prefix, suffix)

    def matches(self, path: str) -> bool:
        """Whether the whole path matches. Raises `PeftcError` when the time is up."""
        return self._match(path) is not None

    def index(self, path: str) -> int | None:
        """The number that the group `idx` found, None without a match. Raises `PeftcError` when the time is up."""
        found = self._match(path)
        return int(found["idx"]) if found else None

    def replaced(self, replacement: str, text: str) -> tuple[str, int]:
        """The text with every occurrence replaced, as `re.subn` does it, and their number.

        Raises `PeftcError` for a replacement that does not fit the pattern, and when the time is up.
        """
        import regex  # here, because most documents have no pattern

        try:
            return self._compiled.subn(replacement, text, timeout=self._deadline.left())
        except TimeoutError:
            raise PeftcError(_slow(self._text, self._deadline.seconds, self._where, text)) from None
        except (regex.error, IndexError) as error:
            what = f"`{_short(replacement)}` cannot replace `{_short(self._text)}`: {error}"
            fix = "Refer to groups that the pattern has, as `\\1`."
            raise PeftcError(rules.BAD_PATTERN(what, fix=fix, where=self._where)) from None

    def _match(self, path: str) -> regex.Match[str] | None:
        try:
            return self._compiled.fullmatch(path, timeout=self._deadline.left())
        except TimeoutError:
            raise PeftcError(_slow(self._text, self._deadline.seconds, self._where, path)) from None


@lru_cache(maxsize=256)
def _compiled(text: str, where: str, prefix: str, suffix: str) -> regex.Pattern[str]:
    """Compiled by the engine that can stop, after the standard one accepted it: what is read is what the reference reads."""
    if len(text) > MAX_PATTERN:
        what = f"The pattern has {len(text):,} characters, more than {MAX_PATTERN:,}"
        raise PeftcError(rules.LONG_PATTERN(what, fix="Use a list of names, which may be long.", where=where))
    repeats = 1
    for low, high in _COUNT.findall(text):
        repeats *= max(int(low or 0), int(high or 0), 1)
    if repeats > MAX_REPEATS:
        what = f"The counts of `{_short(text)}` multiply to {repeats:,} repetitions, more than {MAX_REPEATS:,}"
        raise PeftcError(rules.LONG_PATTERN(what, fix="Use `*`, `+` or smaller counts.", where=where))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # sets like `[[`: the two engines would differ
            re.compile(prefix + text + suffix)
        import regex  # here, because most documents have no pattern

        return regex.compile(prefix + _LITERAL_BRACE.sub(r"\\{", text) + suffix)
    except (re.error, RecursionError, OverflowError, FutureWarning, ValueError) as error:
        raise PeftcError(_invalid(text, where, error)) from None


def _invalid(text: str, where: str, error: Exception) -> Diagnostic:
    if isinstance(error, re.error):
        try:
            re.compile(text)  # alone, so that the position is one in the text as written
        except re.error as own:
            error = own
    position = error.pos if isinstance(error, re.error) else None
    reason = error.msg if isinstance(error, re.error) else str(error)
    at = "" if position is None or position > len(text) else f" at character {position + 1}"
    fix = "Correct the regular expression; a list of names needs none."
    return rules.BAD_PATTERN(f"`{_short(text)}` is not a regular expression: {reason}{at}", fix=fix, where=where)


def _slow(text: str, seconds: float, where: str, path: str) -> Diagnostic:
    what = f"`{_short(text)}` took more than {seconds:g} s; it was stopped at `{path}`"
    return rules.SLOW_PATTERN(what, fix="Avoid nested repetition such as `(a+)+`, or use a list of names.", where=where)


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def matches(targets: Collection[str] | str, path: str) -> bool:
    """Whether a path is meant by a list of names or a regular expression. Raises `PeftcError` on a bad pattern.

    >>> matches(["q_proj"], "model.layers.0.self_attn.q_proj"), matches("q_proj", "model.layers.0.self_attn.q_proj")
    (True, False)
    """
    if isinstance(targets, str):
        return Pattern(targets, Deadline(), "$").matches(path)
    return any(suffix in targets for suffix in suffixes(path))


class PatternKeys:
    """The keys of a pattern option: the first that matches the end of a path wins.

    A key is the regular expression `(.*\\.)?(KEY)$`. Keys of plain names, of which some files have thousands, are found by
    look-up: their dots match any character, so they are filed by length and by where their dots are.
    """

    def __init__(self, keys: Sequence[str], deadline: Deadline, where: str) -> None:
        self._keys = tuple(keys)
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._patterns: list[tuple[int, Pattern]] = []
        for number, key in enumerate(self._keys):
            if _PLAIN_KEY(key):
                dots = tuple(i for i, char in enumerate(key) if char == ".")
                self._plain.setdefault(len(key), {}).setdefault(dots, {}).setdefault(key, number)
            else:
                place = json_path((key,), root=where)
                self._patterns.append((number, Pattern(key, deadline, place, prefix=r"(.*\.)?(", suffix=")$")))

    def find(self, path: str) -> str | None:
        """The key in force for a path. Raises `PeftcError` when the time is up."""
        best = min(self._lookups(path), default=len(self._keys))
        for number, pattern in self._patterns:
            if number >= best:
                break
            if pattern.matches(path):
                return self._keys[number]
        return self._keys[best] if best < len(self._keys) else None

    def _lookups(self, path: str) -> Iterable[int]:
        for ending in suffixes(path):
            for dots, table in self._plain.get(len(ending), {}).items():
                number = table.get(_with_dots(ending, dots))
                if number is not None:
                    yield number


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    chars = list(text)
    for place in places:
        chars[place] = "."
    return "".join(chars)


class Layers:
    """Which layer a path is in: the first number in it, or the first one after a named list of layers.

    The reference overlooks a list of layers at the model's root (`h.0.attn`); here it counts.
    """

    def __init__(self, patterns: Sequence[str], deadline: Deadline, where: str) -> None:
        self._patterns = [
            Pattern(text, deadline, where, prefix=r"(?:^|.*?\.)", suffix=r"\.(?P<idx>\d+)\..*") for text in patterns
        ]

    def index(self, path: str) -> int | None:
        """The index of the layer that contains the path, None outside of layers. Raises `PeftcError` when time is up."""
        if self._patterns:
            return next((i for p in self._patterns if (i := p.index(path)) is not None), None)
        return next((int(part) for part in path.split(".")[:-1] if part.isdecimal()), None)


def shortened(targets: Collection[str], paths: Iterable[str]) -> frozenset[str]:
    """The fewest, shortest suffixes that mean these full paths and none of the other paths.

    It is the list that the reference writes for many targets: for each target in the order of its suffixes, the shortest
    one that no other path has, unless a suffix taken before covers it.
    """
    wanted = frozenset(targets)
    alike: dict[str, list[str]] = {}
    for path in wanted:
        alike.setdefault(path.rpartition(".")[2], []).append(path)
    rivals: dict[str, set[str]] = {}
    for path in paths:
        last = path.rpartition(".")[2]
        if last in alike and path not in wanted:
            rivals.setdefault(last, set()).update(suffixes(path))
    taken: set[str] = set()
    for last, group in alike.items():
        taken |= _distinguished(group, rivals[last]) if last in rivals else {last}
    return frozenset(taken)


def _distinguished(group: list[str], rivals: set[str]) -> set[str]:
    """Suffixes for targets whose last name other paths have too; `rivals` are the suffixes of those."""
    taken: set[str] = set()
    for endings in sorted([*suffixes(path)][::-1] for path in group):
        if not any(ending in taken for ending in endings[:-1]):
            taken.add(next((e for e in endings if e not in taken and e not in rivals), endings[-1]))
    return taken
