"""A sample of tests that is the same each time and has some of every kind."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

_CONFIG = re.compile(r"[A-Za-z0-9]+Config(?![A-Za-z])")


def sample(tests: Iterable[str], count: int) -> list[str]:
    """`count` of the tests: of every kind at least one, where there is room, and the rest in proportion to its size.

    Within a kind they come in the order of a hash, so a larger sample has a smaller one in it, but for rounding.
    """
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for test in sorted(set(tests), key=_digest):
        kinds[_kind(test)].append(test)
    chosen = [inside[0] for inside in kinds.values()][:count]
    spare = sum(len(inside) - 1 for inside in kinds.values())
    room = min(count - len(chosen), spare)
    wanted = {kind: room * (len(inside) - 1) / max(spare, 1) for kind, inside in kinds.items()}
    shares = {kind: int(size) for kind, size in wanted.items()}
    for kind in sorted(wanted, key=lambda kind: shares[kind] - wanted[kind])[: room - sum(shares.values())]:
        shares[kind] += 1
    return sorted([*chosen, *(test for kind, inside in kinds.items() for test in inside[1 : 1 + shares[kind]])])


def _kind(test: str) -> tuple[str, str]:
    """The file, and the config that the parameters name; where they name none, the class of tests."""
    name, _, parameters = test.partition("[")
    file, *inside = name.split("::")
    found = _CONFIG.search(parameters)
    return file, found[0] if found else "".join(inside[:-1])


def _digest(test: str) -> str:
    return hashlib.sha256(test.encode()).hexdigest()
