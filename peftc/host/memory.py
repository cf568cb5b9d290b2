"""The system's allocator, for a process that handles one large tensor after the other: what is freed goes back at once, and comes
in large pages.

Imports nothing: torch reads its part when it allocates first.
"""

from __future__ import annotations

import ctypes
import os
import sys

#: glibc's `M_MMAP_THRESHOLD`, and the bytes from which on a piece of memory is the system's and not the heap's. Left alone, it
#: grows to what was freed last, and the heap keeps holes of that size.
_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 22


def keep_small() -> None:
    """Set both for the whole process; where the system has no such settings nothing happens.

    Relies on: torch's `THP_MEM_ALLOC_ENABLE` (2.2), which has large tensors in large pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE)
