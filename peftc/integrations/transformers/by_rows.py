"""Weights that adapters only add to, merged file to file: read, changed and written a block of rows at a time, so that a weight is
never in memory whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from peftc.checkpoint.patched import Patching
from peftc.checkpoint.shards import Shards
from peftc.diagnostics import PeftcError
from peftc.runtime.layer.merged import not_finite
from peftc.runtime.layer.parts import Part
from peftc.runtime.layer.sums import Sums, is_finite
from peftc.runtime.slots.filling import torch_dtype

#: Threads: at least two, so that one computes while the other waits for the disk; Python lets few run at once.
_THREADS = min(4, max(2, os.cpu_count() or 1))
_CPU = torch.device("cpu")


class Rows:
    """Weights under way."""

    def __init__(self, shards: Shards, out: Patching, pool: ThreadPoolExecutor) -> None:
        self._shards, self._out, self._pool = shards, out, pool
        self._stop = threading.Event()
        self._under_way: list[Future[None]] = []

    def change(self, name: str, sums: Sums, parts: Sequence[Part]) -> None:
        """Have a tensor of the files changed, soon. `parts` are the adapters that do it."""
        self._under_way.append(self._pool.submit(self._changed, name, sums, parts))

    def finish(self) -> None:
        """Wait for all. Raises what the first of them raised: `OSError`, and `PeftcError` for files that cannot be read and sums that
        are not finite."""
        for one in self._under_way:
            one.result()

    def give_up(self) -> None:
        """Leave what is not done yet."""
        self._stop.set()

    def _changed(self, name: str, sums: Sums, parts: Sequence[Part]) -> None:
        facts = self._shards.tensors[name]
        total = facts.shape[0]
        rows, columns = min(sums.rows(_CPU), total), facts.numel // max(total, 1)
        weight, room = torch.empty(rows, columns, dtype=torch_dtype(facts.dtype)), sums.room(rows, _CPU)
        content = memoryview(weight.view(-1).view(torch.uint8).numpy().data)
        width = columns * weight.element_size()
        with torch.no_grad():  # which is said in each thread
            for first in range(0, total, rows):
                if self._stop.is_set():
                    return
                count = min(rows, total - first)
                block = content[: count * width]
                self._shards.fill(name, block, first * width)
                summed = sums.put(first, weight[:count], weight[:count], room)
                if not is_finite(summed):
                    raise PeftcError(not_finite(parts, "weights"))
                self._out.put(name, block, first * width)


@contextmanager
def by_rows(shards: Shards, out: Patching) -> Iterator[Rows]:
    """Within, weights can be named; at the end they are done. Raises what `Rows.finish` does."""
    threads = torch.get_num_threads()
    # in each thread torch has one of its own: see `one_thread`
    with ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = Rows(shards, out, pool)
        try:
            yield rows
            rows.finish()
        finally:
            rows.give_up()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # for threads that are started from now on
