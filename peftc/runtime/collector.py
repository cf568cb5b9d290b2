"""When garbage is not collected: while thousands of objects are made and none is dropped, each pass would walk them all."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from peftc.runtime.journal import note


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside. Nests."""
    running = gc.isenabled()
    if running:
        note(gc.enable)
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
