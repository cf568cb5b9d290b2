"""The hooks of plugins. Entry-point group `peftc.tuners`: the entry's name is the PEFT type in lower case; `peftc.variants`:
`<peft type>.<name of the variant>`; `peftc.starts`: the name of the start; `peftc.storages`: the name of the storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from peftc.tuner.method import TunerMethod
    from peftc.tuner.start import Start
    from peftc.tuner.storage import Storage
    from peftc.tuner.variant import Variant

PROJECT = "peftc"
GROUP = "peftc.tuners"
VARIANTS = "peftc.variants"
STARTS_GROUP = "peftc.starts"
STORAGES_GROUP = "peftc.storages"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def peftc_tuner() -> TunerMethod:  # type: ignore[empty-body]  # a specification has no body
    """Return the record of the one method that this module brings."""


@hookspec(firstresult=True)
def peftc_variant() -> Variant[Any]:  # type: ignore[empty-body]
    """Return the record of the one variant of a method that this module brings."""


@hookspec(firstresult=True)
def peftc_start() -> Start:  # type: ignore[empty-body]  # a specification has no body
    """Return the one start that this module brings."""


@hookspec(firstresult=True)
def peftc_storage() -> Storage:  # type: ignore[empty-body]  # a specification has no body
    """Return the one storage that this module brings."""
