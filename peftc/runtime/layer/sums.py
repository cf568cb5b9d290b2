"""What adapters that add to a weight come to, by blocks of its rows: `W + s · B A`, in memory that stays near the processor.

Merging in memory and merging files both go through here, so that they come to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftc.runtime.layer.parts import Part
from peftc.tuner.maps import MapTuner

#: Numbers of a block: with what is read and written for it, it fits into a core's own cache. On other devices a call costs more
#: than memory does.
_BLOCK, _BLOCK_ELSEWHERE = 1 << 16, 1 << 24


def is_sum(tuner: MapTuner[Any], parameter: str) -> bool:
    """Whether an adapter does no more than add a product of thin factors to its layer's whole weight; `parameter` is the one that it
    is on, if on a single one."""
    return "thin" in tuner.lowerings and "params" not in tuner.lowerings and not parameter


@dataclass(frozen=True, slots=True)
class Sums:
    """Adapters that add to one weight, in order. `terms` are their factors, `(rows, r)` and `(r, columns)`, and scales; rows are
    those of the weight as it lies in memory, which is the transposed one where `flipped`. `dtype` is that of the arithmetic."""

    terms: Sequence[tuple[Tensor, Tensor, float]]
    dtype: torch.dtype
    flipped: bool

    @classmethod
    def of(cls, parts: Sequence[Part], weight: Tensor, pristine: torch.dtype) -> Sums | None:
        """Of a weight in logical order, whose base has another number format perhaps, the `pristine` one. None unless all of the
        parts are sums in one format, of a matrix that lies without gaps, and nothing is to be differentiated."""
        if torch.is_grad_enabled() or weight.dim() != 2:
            return None
        if not all(is_sum(part.tuner, part.parameter) for part in parts):
            return None
        flipped = not weight.is_contiguous()
        if flipped and not weight.t().is_contiguous():
            return None
        dtypes = {torch.promote_types(part.view.dtype(), pristine) for part in parts}
        terms = []
        for part in parts:
            A, B, scale = part.lowering("thin")(part.view)
            if isinstance(scale, Tensor) or dtypes != {torch.result_type(A, B)}:
                return None
            A, B = A.flatten(1), B.flatten(1)
            terms.append((A.t(), B.t(), scale) if flipped else (B, A, scale))
        return cls(terms, terms[0][0].dtype, flipped) if terms else None

    def lying(self, weight: Tensor) -> Tensor:
        """A weight in logical order as it lies in memory."""
        return weight.t() if self.flipped else weight

    def rows(self, device: torch.device) -> int:
        """How many rows to take at a time."""
        return max(1, (_BLOCK if device.type == "cpu" else _BLOCK_ELSEWHERE) // max(self.terms[0][1].shape[1], 1))

    def room(self, rows: int, device: torch.device) -> list[Tensor]:
        """Memory for so many rows, to be used again and again."""
        columns = self.terms[0][1].shape[1]
        return [torch.empty(rows, columns, dtype=self.dtype, device=device) for _ in self.terms[:2]]

    def put(self, first: int, weight: Tensor, out: Tensor, room: Sequence[Tensor]) -> Tensor:
        """Rows of the weight from one on, changed, into `out`, which may be those rows themselves. Returns them before they are
        rounded, in `room`. To be called by `one_thread`, without which a block of rows would be rounded as the whole is not."""
        for place, (left, right, scale) in enumerate(self.terms):
            sums = room[place % 2][: weight.shape[0]]
            torch.mm(left[first : first + weight.shape[0]], right, out=sums)
            if scale != 1:
                sums.mul_(scale)
            weight = sums.add_(weight)
        out.copy_(weight)
        return weight

    def whole(self, weight: Tensor, out: Tensor, check: bool = False) -> bool:
        """All rows; both tensors lie as the weight does. With `check`, whether all numbers are finite; at others it stops."""
        rows = self.rows(weight.device)
        room = self.room(min(rows, weight.shape[0]), weight.device)
        with one_thread():
            for first in range(0, weight.shape[0], rows):
                sums = self.put(first, weight[first : first + rows], out[first : first + rows], room)
                if check and not is_finite(sums):
                    return False
        return True


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes in the calling thread, and in one of each that is started there: how a product is parted among threads
    decides how it is rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity: a sum has one then. Where a sum is too large it is looked at number by number."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
