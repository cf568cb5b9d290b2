"""What is lost where a merged weight is packed anew: measured for each layer, told once for a merge.

The measure is the part that rounding has of the change: ‖Q(W') - W'‖ / ‖W' - W‖, Frobenius norms, W as it was opened.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from peftc import rules
from peftc.diagnostics import warn


@dataclass
class Rounded:
    """The part that rounding has of each layer's change, by path, and by which storages."""

    parts: dict[str, float] = field(default_factory=dict)
    storages: set[str] = field(default_factory=set)


class _Open(threading.local):
    """The merge that is open in a thread."""

    found: Rounded | None = None


_open = _Open()


@contextmanager
def told() -> Iterator[Rounded]:
    """Within, layers that are packed anew are measured; at the end the user is told, if nobody around does. Gives what was found."""
    outer = _open.found
    found = outer if outer is not None else Rounded()
    _open.found = found
    try:
        yield found
    finally:
        _open.found = outer
    if outer is None and found.parts:
        _tell(found)


def is_asked() -> bool:
    """Whether anybody wants to know."""
    return _open.found is not None


def measured(path: str, storage: str, before: Tensor, wanted: Tensor, got: Tensor) -> None:
    """Note a layer's weight `(out, in)`: as it was, as it should be, and as it came out."""
    found = _open.found
    if found is None:
        return
    wanted = wanted.float()
    change = (wanted - before.float()).norm().item()
    lost = (got.float() - wanted).norm().item()
    found.parts[path] = lost / change if change else 0.0
    found.storages.add(storage)


def _tell(found: Rounded) -> None:
    ordered = sorted(found.parts.values())
    worst = max(found.parts, key=lambda path: found.parts[path])
    count = f"{len(ordered)} layer{'s' if len(ordered) > 1 else ''}"
    what = (
        f"{count} stored by {', '.join(sorted(found.storages))} took what was merged rounded: what is lost has {ordered[len(ordered) // 2]:.0%} "
        f"of the size of the change in the middle one, {found.parts[worst]:.0%} in the worst, `{worst}`"
    )
    fix = "To lose nothing, keep the adapter beside the model, or give the base plain weights first (`peftc.dequantize(model)`, "
    fix += "`peftc merge --dequantize`)."
    warn([rules.MERGE_ROUNDED(what, fix=fix)])
