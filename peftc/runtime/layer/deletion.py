"""What is said where active adapters are deleted, from a layer or from the model."""

from __future__ import annotations

from collections.abc import Iterable

from peftc import rules
from peftc.diagnostics import warn


def tell(gone: Iterable[str], heir: str | None) -> None:
    """Warn that active adapters are deleted, and of what acts now."""
    names = [f"`{name}`" for name in gone]
    verbs = ("was", "is") if len(names) == 1 else ("were", "are")
    what = f"{', '.join(names)} {verbs[0]} active and {verbs[1]} deleted"
    if heir is None:
        what = f"{what}; no adapter is left, and the model computes as its base"
        fix = "Add or load another adapter, or call `unload()` to go on with the base model."
    else:
        what, fix = f"{what}; `{heir}` is active now", "Call `set_adapter` for another, before this one is deleted."
    warn([rules.ACTIVE_DELETED(what, fix=fix)])
