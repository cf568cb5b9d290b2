"""The bytes of a file that stays open: whoever reads them has those of one file, whatever takes its name meanwhile."""

from __future__ import annotations

from io import FileIO
from pathlib import Path
from weakref import finalize

from peftc.checkpoint.format import FormatError


class Content:
    """A file that is open for as long as this object is there. Not for several threads at once."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`."""
        self.file = FileIO(path)
        finalize(self, self.file.close)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with what is at a position. Raises `OSError`, and `FormatError` for a file that ends before."""
        self.file.seek(start)
        done = self.file.readinto(buffer)
        if done == buffer.nbytes:
            return
        rest = buffer.cast("B")
        while done:  # a system reads so much at a time, less than the largest tensors have
            rest = rest[done:]
            done = self.file.readinto(rest)
        if rest.nbytes:
            raise FormatError(f"{rest.nbytes:,} bytes that it had when it was opened are missing; it was cut short")
