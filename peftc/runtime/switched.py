"""Switching adapters off and on; having a model compute as its base for a while, whatever state its adapters are in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peftc import rules
from peftc.diagnostics import warn
from peftc.runtime.journal import keep, note, whole
from peftc.runtime.layer import TunerLayer
from peftc.runtime.modules import ModuleWrapper
from peftc.runtime.saved_modules import ModulesToSaveWrapper

if TYPE_CHECKING:
    from peftc.runtime.session import Session

Wrapper = TunerLayer | ModuleWrapper | ModulesToSaveWrapper


@whole
def switch(session: Session, enabled: bool) -> None:
    """Let the active adapters, and merged ones, act, or not; what they train of the base is theirs, or as it was before."""
    keep(session)
    # what is switched on is all: another adapter may be on a layer by now than when it was switched off
    among: list[Wrapper] = _all(session) if enabled else _acting(session)
    wrappers = [wrapper for wrapper in among if wrapper.disable_adapters is enabled]
    note(_enable, wrappers, not enabled)
    for wrapper in wrappers:
        wrapper.enable_adapters(enabled)
    session.enabled = enabled
    session.base.act(session.active if enabled else ())


@contextmanager
def disabled(session: Session) -> Iterator[None]:
    """Within the block no adapter acts, merged ones too; afterwards they do as before, merged again as they were.

    Where only some layers were switched off one by one, all are on afterwards, with a warning.
    """
    wrappers = _acting(session)
    off = [wrapper for wrapper in wrappers if wrapper.disable_adapters]
    if off and len(off) < len(wrappers):
        some = "The model contains some adapter layers that are enabled and others that are disabled"
        what = f"{some}, {len(off)} of {len(wrappers)}; after the block all are enabled"
        warn([rules.PARTLY_DISABLED(what, fix="Enable them before, or disable all with `disable_adapter_layers`.")])
    before = session.enabled and not (off and len(off) == len(wrappers))
    try:
        session.enable(False)
        try:
            yield
        finally:
            session.enable(before)
    except BaseException:  # of the block, or an interrupt while they were switched: that is gone the second time
        if session.enabled is not before:
            session.enable(before)
        raise


def _acting(session: Session) -> list[Wrapper]:
    """What holds adapters that are active or merged."""
    names = [name for name in dict.fromkeys((*session.active, *session.merged)) if name in session.plans]
    of = (session.layers_of, session.modules_of, session.copies_of)
    return list({id(wrapper): wrapper for name in names for found in of for wrapper in found(name)}.values())


def _enable(wrappers: Sequence[Wrapper], enabled: bool) -> None:
    for wrapper in wrappers:
        wrapper.enable_adapters(enabled)


def _all(session: Session) -> list[Wrapper]:
    """What holds adapters, or held some."""
    return [*session.wrappers(), *session.modules.values(), *session.copies.values()]
