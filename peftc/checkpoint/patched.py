"""Writing files of weights anew with some of their tensors replaced: what stays is copied in large blocks and never looked at.

A thread copies while the caller makes the other tensors and puts each in its place, in any order. Where nothing changes its
size the header is the old one, byte for byte, and so is where each tensor lies.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from peftc.checkpoint.format import laid_out
from peftc.checkpoint.load import AdapterFile
from peftc.graph.tensors import TensorFacts

#: Bytes that are copied at a time, and after how many the disk is told to write them.
_BLOCK, _FLUSH = 1 << 25, 1 << 27
#: How often progress is told, at most.
_TIMES = 1000
#: The system cannot copy between these files itself.
_COPY_OTHERWISE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF})


@dataclass(frozen=True)
class Patch:
    """One file to be made from another: `spans` are `(from, to, bytes)` of what is copied, `places` where each tensor goes
    that is given, with its bytes."""

    source: AdapterFile
    head: bytes
    spans: Sequence[tuple[int, int, int]]
    places: Mapping[str, tuple[int, int]]
    size: int


def patch_of(source: AdapterFile, given: Mapping[str, TensorFacts]) -> Patch:
    """How to make a file that has these tensors as they will be given, new ones among them, and all others as they are."""
    entries = source.header.entries
    if all(key in entries and entries[key].facts == facts for key, facts in given.items()):
        first = min((entry.start for entry in entries.values()), default=0)
        head, size = _head(source, first), max((e.start + e.facts.nbytes for e in entries.values()), default=first)
        starts = {key: entry.start for key, entry in entries.items()}
    else:
        laid = laid_out({**source.tensors, **given}, source.header.metadata)
        head, starts, size = laid.head, dict(laid.starts), laid.size
    kept = sorted((entries[key].start, starts[key], entries[key].facts.nbytes) for key in entries if key not in given)
    places = {key: (starts[key], facts.nbytes) for key, facts in given.items()}
    return Patch(source, head, _joined(kept), places, size)


def _head(source: AdapterFile, first: int) -> bytes:
    head = bytearray(first)
    source.content.read_into(memoryview(head), 0)
    return bytes(head)


def _joined(spans: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Spans that follow each other in both files, as one."""
    found: list[tuple[int, int, int]] = []
    for begin, place, length in spans:
        if found and (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]) == (begin, place):
            found[-1] = (*found[-1][:2], found[-1][2] + length)
        elif length:
            found.append((begin, place, length))
    return found


class Patching:
    """Files that are being made."""

    def __init__(self, told: Callable[[int], None], aside: ThreadPoolExecutor, total: int) -> None:
        self._told, self._aside, self._step = told, aside, total // _TIMES
        self._lock = threading.Lock()
        self._done = self._heard = 0
        self._since: dict[int, int] = {}
        self._pushes: list[Future[None]] = []
        self._stop = threading.Event()
        self._open: dict[str, tuple[int, int, int]] = {}
        self._left: dict[str, int] = {}

    def open(self, handle: int, patch: Patch) -> None:
        """Let the tensors of a file be given."""
        for key, (place, length) in patch.places.items():
            self._open[key] = handle, place, length
            self._left[key] = length

    def put(self, key: str, content: memoryview, at: int = 0) -> None:
        """Write a tensor that is given, or the part of it that begins `at` a byte, each once; from any thread. Raises `OSError`,
        and `ValueError` for content that has no place there."""
        handle, place, length = self._open[key]
        if at + content.nbytes > length:
            raise ValueError(f"`{key}` gave {at + content.nbytes:,} bytes and has a place for {length:,}")
        rest, place = content.cast("B") if content.nbytes else content, place + at
        while rest.nbytes:
            written = os.pwrite(handle, rest, place)
            place, rest = place + written, rest[written:]
        with self._lock:
            self._left[key] -= content.nbytes
            since = self._since[handle] = self._since.get(handle, 0) + content.nbytes
            if since >= _FLUSH:  # so that the disk is at work while other tensors are made
                self._since[handle] = 0
                self._pushes.append(self._aside.submit(_push, handle))
        self.count(content.nbytes)

    def finish(self) -> None:
        """Wait for what is under way. Raises `OSError`, and `ValueError` unless every tensor that is given is there whole."""
        self._told(self._done)
        for push in self._pushes:
            push.result()
        for key, left in self._left.items():
            if left:
                raise ValueError(f"`{key}` was not given: {left:,} bytes are missing")

    def count(self, length: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._done += length
            if self._done - self._heard >= self._step:
                self._heard = self._done
                self._told(self._done)

    def copy(self, jobs: Sequence[tuple[int, int, Patch]]) -> None:
        """Copy what stays of all files, until it is done or another part failed. Raises `OSError`."""
        for source, target, patch in jobs:
            since = 0
            for begin, place, length in patch.spans:
                for part in _blocks(source, target, begin, place, length):
                    if self._stop.is_set():
                        return
                    self.count(part)
                    since += part
                    if since >= _FLUSH:  # so that the disk is at work while other tensors are made
                        _push(target)
                        since = 0
            _push(target)


@contextmanager
def patching(patches: Mapping[Path, Patch], told: Callable[[int], None]) -> Iterator[Patching]:
    """Make files, by their paths: within, `put` is called once for every tensor that is given; in the end all are whole.

    `told` hears how many bytes are done, from either thread. Raises `OSError`, and `ValueError` if a tensor was not given.
    """
    with ExitStack() as files, ExitStack() as threads:
        aside = threads.enter_context(ThreadPoolExecutor(1))  # copies, then has the disk write
        made = Patching(told, aside, sum(patch.size for patch in patches.values()))
        jobs = []
        for path, patch in patches.items():
            target = files.enter_context(path.open("wb"))
            handle = target.fileno()
            _reserve(handle, patch.size)
            os.pwrite(handle, patch.head, 0)
            made.count(len(patch.head))
            made.open(handle, patch)
            jobs.append((patch.source.content.file.fileno(), handle, patch))
        copying = aside.submit(made.copy, jobs)
        try:
            yield made
        except BaseException:
            made._stop.set()
            raise
        copying.result()
        made.finish()


def _reserve(handle: int, size: int) -> None:
    """Have room for a file before anything is written to it. Raises `OSError` where there is none."""
    try:
        os.posix_fallocate(handle, 0, size)
    except AttributeError:  # not on this system
        os.truncate(handle, size)
    except OSError as error:
        if error.errno not in _COPY_OTHERWISE:
            raise
        os.truncate(handle, size)


def _push(handle: int) -> None:
    try:
        os.fdatasync(handle)
    except AttributeError:  # not on this system
        os.fsync(handle)


def _blocks(source: int, target: int, begin: int, place: int, length: int) -> Iterator[int]:
    """Copy so many bytes from one file to another; yields how many each time. Raises `OSError`."""
    direct = True
    while length:
        size, done = min(length, _BLOCK), 0
        if direct:
            try:
                done = os.copy_file_range(source, target, size, begin, place)
            except AttributeError:  # not on this system
                direct = False
            except OSError as error:
                if error.errno not in _COPY_OTHERWISE:
                    raise
                direct = False
        if not direct:
            block = os.pread(source, size, begin)
            done = len(block)
            rest = memoryview(block)
            while rest.nbytes:
                rest = rest[os.pwrite(target, rest, place + done - rest.nbytes) :]
        if not done:
            raise OSError(errno.EIO, "The file is shorter than when it was opened")
        begin, place, length = begin + done, place + done, length - done
        yield done
