"""Repeated modules as one line: `model.layers.{0..29}.self_attn.q_proj` ×30, for views of graphs and plans.

Nothing is rounded: braces stand for exactly the paths that were given, written as a shell would expand them, with
`{0..56..4}` for steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
_Row = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group(Generic[T]):
    """Paths that differ only in numbers and share what they were grouped by (`tag`); `first` is one of them."""

    pattern: str
    first: str
    count: int
    tag: T


def grouped(tagged: Iterable[tuple[str, T]]) -> list[Group[T]]:
    """Group `(path, tag)` pairs by tag and by the path without its numbers, in the order first met.

    >>> [group.pattern for group in grouped((f"layers.{i}.{name}", 0) for i in range(3) for name in "qk")]
    ['layers.{0..2}.q', 'layers.{0..2}.k']
    """
    families: dict[tuple[tuple[str, ...], T], list[_Row]] = {}
    for path, tag in tagged:
        parts = [_part(part) for part in path.split(".")]
        names = tuple(name for name, _ in parts)
        families.setdefault((names, tag), []).append(tuple(number for name, number in parts if not name))
    found = []
    for (names, tag), rows in families.items():
        for product in _products(rows):
            count = 1
            for numbers in product:
                count *= len(numbers)
            first = _filled(names, [str(numbers[0]) for numbers in product])
            found.append(Group(_filled(names, [ranges(numbers) for numbers in product]), first, count, tag))
    return found


def _products(rows: list[_Row]) -> list[tuple[_Row, ...]]:
    """Rows as few products of sets of numbers: `[(0, 0), (0, 1), (1, 0), (1, 1)]` is `((0, 1), (0, 1))`."""
    if not rows[0]:
        return [()]
    rest: dict[int, list[_Row]] = {}
    for first, *others in rows:
        rest.setdefault(first, []).append(tuple(others))
    alike: dict[tuple[tuple[_Row, ...], ...], list[int]] = {}
    for first, below in rest.items():
        alike.setdefault(tuple(_products(below)), []).append(first)
    return [(tuple(firsts), *product) for products, firsts in alike.items() for product in products]


def ranges(numbers: Iterable[int]) -> str:
    """A set of numbers as a shell would expand it, one number as it is.

    >>> ranges([3]), ranges(range(30)), ranges([0, 4, 8, 12]), ranges([0, 1, 2, 7])
    ('3', '{0..29}', '{0..12..4}', '{0..2,7}')
    """
    left = sorted(set(numbers))
    if len(left) == 1:
        return str(left[0])
    parts = []
    while left:
        run = _run(left)
        step = run[1] - run[0] if len(run) > 1 else 0
        parts.append(str(run[0]) if not step else f"{run[0]}..{run[-1]}" + (f"..{step}" if step > 1 else ""))
        left = left[len(run) :]
    return "{" + ",".join(parts) + "}"


def _run(numbers: list[int]) -> list[int]:
    """The longest start with equal steps, if it is worth a range: two neighbours, or three with a wider step."""
    if len(numbers) < 2:
        return numbers
    step = numbers[1] - numbers[0]
    length = 2
    while length < len(numbers) and numbers[length] - numbers[length - 1] == step:
        length += 1
    return numbers[:length] if length > 2 or step == 1 else numbers[:1]


@lru_cache(maxsize=4096)
def _part(part: str) -> tuple[str, int]:
    """A segment's name, empty for a number, and the number."""
    return ("", int(part)) if part.isascii() and part.isdigit() else (part, 0)


def _filled(names: tuple[str, ...], numbers: list[str]) -> str:
    left = iter(numbers)
    return ".".join(name or next(left) for name in names)
