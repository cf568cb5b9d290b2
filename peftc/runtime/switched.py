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
    wrappers = _acting(session)
    note(_enable, wrappers, [not wrapper.disable_adapters for wrapper in wrappers])
    for wrapper in wrappers:
        if wrapper.disable_adapters is enabled:
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
    session.enable(False)
    try:
        yield
    finally:
        session.enable(before)


def _acting(session: Session) -> list[Wrapper]:
    """What holds adapters that are active or merged."""
    names = [name for name in dict.fromkeys((*session.active, *session.merged)) if name in session.plans]
    of = (session.layers_of, session.modules_of, session.copies_of)
    return list({id(wrapper): wrapper for name in names for found in of for wrapper in found(name)}.values())


def _enable(wrappers: Sequence[Wrapper], enabled: Sequence[bool]) -> None:
    for wrapper, acts in zip(wrappers, enabled, strict=True):
        wrapper.enable_adapters(acts)
