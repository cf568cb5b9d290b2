"""What starts that decompose a matrix have in common."""

from __future__ import annotations

from peftc import plugin as p


def lowrank(s: p.StartView, matrix: p.Tensor, count: int, steps: int) -> tuple[p.Tensor, p.Tensor, p.Tensor]:
    """The largest `count` components `(U, S, V)` of a matrix, by subspace iteration from a random start (Halko et al. 2009,
    algorithms 4.4 and 5.1): V is `(columns, count)`. The random numbers are as many as `torch.svd_lowrank` draws."""
    import torch

    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    basis = torch.linalg.qr(tall @ s.normal(tall.shape[1], count).to(tall)).Q
    for _ in range(steps):
        basis = torch.linalg.qr(tall.t() @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    inner, values, rows = torch.linalg.svd(basis.t() @ tall, full_matrices=False)
    left, right = basis @ inner, rows.t()
    return (left, values, right) if tall is matrix else (right, values, left)


def shared(left: p.Tensor, values: p.Tensor, right: p.Tensor) -> p.Begun:
    """Factors of `U S V`, each with the square roots of the values: U is `(out, r)`, V `(in, r)`."""
    roots = values.sqrt()
    return p.Begun(roots[:, None] * right.t(), left * roots)
