"""Deleting adapters: where nothing is active any more, another takes over; the last one leaves the model as its base.

Who goes on without a word trains nothing, or answers as the base, after the adapter in use was deleted.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftc import rules
from peftc.diagnostics import PeftcError, Severity, warn
from peftc.runtime.journal import whole
from peftc.runtime.layer.deletion import tell
from peftc.runtime.session.session import Session


@whole
def delete(session: Session, names: Iterable[str], trained: bool = False) -> None:
    """Remove adapters; layers keep the others. If nothing is active any more, the first of them takes over, with a warning,
    and trains if one that was active did, in the model or, by `trained`, beside it.

    Raises `PeftcError`, with nothing changed: one is not there, is merged, or is weighed by another.
    """
    gone = list(dict.fromkeys(names))
    session.require(gone)
    _refuse_weighed(session, gone)
    merged = [name for name in gone if name in session.merged]
    if merged:
        what = f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first."
        raise PeftcError(rules.WHILE_MERGED(what, fix="Call `unmerge_adapter()` first."))
    acted = [name for name in gone if name in session.active]
    trained = trained or any(tensor.requires_grad for name in acted for tensor in session.tensors(name).values())
    for name in gone:
        session.remove(name)
    if acted and not session.active:
        heir = _heir(session)
        tell(acted, heir)
        if heir is not None:
            session.set_active([heir], trainable=trained)


def make_room(session: Session | None, name: str) -> None:
    """Remove an adapter, with a warning, for another of its name. Raises `PeftcError`: it is merged, or weighed by another."""
    if session is None or name not in session.plans:
        return
    session.refuse_merged(name)
    _refuse_weighed(session, [name])
    what = f"There was an adapter `{name}`, and the new one takes its place"
    warn([rules.ADAPTER_EXISTS(what, fix="Use another name to have both.", severity=Severity.WARNING)])
    session.remove(name)


def _refuse_weighed(session: Session, names: Iterable[str]) -> None:
    owners = {name: owner for name in names if (owner := session.plans[name].needed_by)}
    if owners:
        raise PeftcError(
            rules.ADAPTER_UNKNOWN(f"`{name}` is part of `{owner}`, which weighs it", fix=f"Delete `{owner}`.")
            for name, owner in owners.items()
        )


def _heir(session: Session) -> str | None:
    """Which adapter takes over, as in the reference: on layers the first by name, else the one that came first."""
    left = [name for name, plan in session.plans.items() if not plan.needed_by]
    return next(iter(sorted(left) if any(session.plans[name].maps for name in left) else left), None)
