"""The hooks of a plugin. Entry-point group `peftc.tuners`; the entry's name is the PEFT type in lower case."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from peftc.tuner.method import TunerMethod

PROJECT = "peftc"
GROUP = "peftc.tuners"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def peftc_tuner() -> TunerMethod:  # type: ignore[empty-body]  # a specification has no body
    """Return the record of the one method that this module brings."""
