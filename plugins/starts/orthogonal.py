"""Orthogonal start: rows of A and columns of B lie in spaces that are orthogonal to each other, so that `B A = 0` with both at
random.

https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
"""

from __future__ import annotations

from typing import ClassVar

from peftc import plugin as p

#: What random factors are divided by.
DAMPING = 10.0


class Orthogonal(p.Start):
    """A and B of the odd and of the even rows of one random rotation."""

    name: ClassVar[str] = "orthogonal"
    summary: ClassVar[str] = "A and B at random, and orthogonal to each other: the update is zero."
    paper: ClassVar[str] = "https://datta0.github.io/posts/rethink-lora-init/"

    def factors(self, s: p.StartView) -> p.Begun:
        import torch

        half = s.rank // 2
        rotation = torch.linalg.qr(s.normal(s.rank, s.rank)).Q
        A = (s.normal(s.weight.shape[1], half) @ rotation[0::2]).t() / DAMPING
        B = s.normal(half, s.weight.shape[0]).t() @ rotation[1::2] / DAMPING
        return p.Begun(A, B)

    def check_layer(self, c: p.PeftConfig, layer: p.LayerFacts, rank: int, path: str) -> p.Problems:
        """An odd rank has no halves."""
        if rank % 2:
            what = f"`orthogonal` needs an even rank, and `{path}` has {rank}"
            fix = f"Set the rank to {rank + 1}, or to {rank - 1}." if rank > 1 else "Set the rank to 2."
            yield p.rules.START_UNFIT(what, fix=fix, where=path)


peftc_start = p.starting(Orthogonal())
