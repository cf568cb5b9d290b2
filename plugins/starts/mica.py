"""MiCA: the update stays in the weakest directions of the weight (arXiv:2604.01694).

B are the left singular vectors of the weight that have the smallest singular values; they do not train. A is zero.
"""

from __future__ import annotations

from typing import ClassVar

from peftc import plugin as p


class Mica(p.Start):
    """`B = U[:, -r:]` of `W = U S V`, frozen, and `A = 0`."""

    name: ClassVar[str] = "mica"
    summary: ClassVar[str] = "B in the weakest directions of the weight, and frozen; A is zero."
    paper: ClassVar[str] = "arXiv:2604.01694"
    kinds: ClassVar[frozenset[p.Kind]] = p.LINEAR_KINDS | {p.Kind.EMBEDDING}
    frozen: ClassVar[str] = "B"
    within_rank: ClassVar[bool] = True

    def factors(self, s: p.StartView) -> p.Begun:
        import torch

        left = torch.linalg.svd(s.weight, full_matrices=False).U
        return p.Begun(s.weight.new_zeros(s.rank, s.weight.shape[1]), left[:, left.shape[1] - s.rank :])


peftc_start = p.starting(Mica())
