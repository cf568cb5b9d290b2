"""Having a model compute as its base for a while, whatever state its adapters are in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peftc import rules
from peftc.diagnostics import warn
from peftc.runtime.session.session import Session


@contextmanager
def disabled(session: Session) -> Iterator[None]:
    """Within the block no adapter acts, merged ones too; afterwards they do as before, merged again as they were.

    Where only some layers were switched off one by one, all are on afterwards, with a warning.
    """
    wrappers = session.acting_wrappers()
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
