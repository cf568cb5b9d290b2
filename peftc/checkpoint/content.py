"""The bytes of a file that stays open: whoever reads them has those of one file, whatever takes its name meanwhile."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from threading import Lock
from weakref import finalize

from peftc.checkpoint.format import FormatError


class Content:
    """A file that is open for as long as this object is there. For several threads at once."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`."""
        self.file = FileIO(path)
        self._turn = Lock()
        finalize(self, self.file.close)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with what is at a position. Raises `OSError`, and `FormatError` for a file that ends before."""
        done = self._read(buffer, start)
        if done == buffer.nbytes:
            return
        rest = buffer.cast("B")
        while done:  # a system reads so much at a time, less than the largest tensors have
            rest, start = rest[done:], start + done
            done = self._read(rest, start)
        if rest.nbytes:
            raise FormatError(f"{rest.nbytes:,} bytes that it had when it was opened are missing; it was cut short")

    def _read(self, buffer: memoryview, start: int) -> int:
        try:
            return os.preadv(self.file.fileno(), [buffer], start)
        except AttributeError:  # not on this system
            with self._turn:
                self.file.seek(start)
                return self.file.readinto(buffer)
