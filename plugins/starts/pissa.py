"""PiSSA: the factors are the principal part of the weight, and the base keeps the rest (Meng et al., arXiv:2404.02948).

`pissa` decomposes exactly; `pissa_niter_N` approximates the largest singular values by N steps of subspace iteration.
"""

from __future__ import annotations

from typing import ClassVar

from peftc import plugin as p

from .decomposed import lowrank, shared

#: What stands before the number of steps.
STEPS = "niter_"


class Pissa(p.Start):
    """`s · B A` are the r largest components of the weight's SVD, each factor with the square roots of the values."""

    name: ClassVar[str] = "pissa"
    summary: ClassVar[str] = (
        "The principal components of the weight, taken out of the base; `pissa_niter_N` finds them faster."
    )
    paper: ClassVar[str] = "arXiv:2404.02948"
    changes_base: ClassVar[bool] = True
    within_rank: ClassVar[bool] = True
    arguments: ClassVar[tuple[str, ...]] = ("", f"{STEPS}4")

    def factors(self, s: p.StartView) -> p.Begun:
        import torch

        if s.argument:
            left, values, right = lowrank(s, s.weight, s.rank, _steps(s.argument))
        else:
            left, values, rows = torch.linalg.svd(s.weight, full_matrices=False)
            left, values, right = left[:, : s.rank], values[: s.rank], rows[: s.rank].t()
        return shared(left, values / s.scaling, right)

    def repeats(self, argument: str) -> bool:
        return not argument

    def check(self, c: p.PeftConfig, argument: str) -> p.Problems:
        """An argument that is no number of steps."""
        if argument and not (argument.startswith(STEPS) and argument.removeprefix(STEPS).isdecimal()):
            what = f"`pissa_{argument}` says no number of steps"
            yield p.rules.START_UNKNOWN(what, fix="Use `pissa`, or `pissa_niter_4` with the number of steps.")


def _steps(argument: str) -> int:
    return int(argument.removeprefix(STEPS))


peftc_start = p.starting(Pissa())
