"""OLoRA: B orthonormal, by a QR decomposition of the weight, and what they add taken out of it (arXiv:2406.01775)."""

from __future__ import annotations

from typing import ClassVar

from peftc import plugin as p


class Olora(p.Start):
    """`W = Q R`: B has the first columns of Q, A the first rows of R."""

    name: ClassVar[str] = "olora"
    summary: ClassVar[str] = (
        "B orthonormal and A triangular, of the weight's QR decomposition; they are taken out of the base."
    )
    paper: ClassVar[str] = "arXiv:2406.01775"
    changes_base: ClassVar[bool] = True
    within_rank: ClassVar[bool] = True

    def factors(self, s: p.StartView) -> p.Begun:
        import torch

        Q, R = torch.linalg.qr(s.weight)
        return p.Begun(R[: s.rank].contiguous(), Q[:, : s.rank].contiguous())


peftc_start = p.starting(Olora())
