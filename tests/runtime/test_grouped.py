"""The grouped low-rank update is the plain formula for each row: ranks, scales, dtypes and gradients of every adapter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftc.ops.grouped import Thin, grouped_low_rank

IN, OUT = 5, 4


def thins(ranks: tuple[int, ...], scales: tuple[float, ...], dtype: torch.dtype = torch.float64) -> list[Thin]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(r, IN, generator=generator, dtype=dtype), torch.randn(OUT, r, generator=generator, dtype=dtype), s)
        for r, s in zip(ranks, scales, strict=True)
    ]


def plain(x: Tensor, given: list[Thin], counts: list[int]) -> Tensor:
    owners = [group for group, count in enumerate(counts) for _ in range(count)]
    return torch.stack([given[g][2] * (row @ given[g][0].T @ given[g][1].T) for g, row in zip(owners, x, strict=True)])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("counts", [[2, 2], [1, 3], [4]], ids=str)
@pytest.mark.parametrize(("ranks", "scales"), [((2, 2), (0.5, 0.5)), ((3, 1), (0.5, 2.0)), ((2, 3), (1.0, 1.0))])
def test_values_and_gradients(
    ranks: tuple[int, ...], scales: tuple[float, ...], counts: list[int], shape: tuple[int, ...]
) -> None:
    given = thins(ranks, scales)[: len(counts)]
    x = torch.randn(4, *shape, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [tensor.requires_grad_() for A, B, _ in given for tensor in (A, B)] + [x.requires_grad_()]
    found, wanted = grouped_low_rank(x, given, counts), plain(x, given, counts)
    torch.testing.assert_close(found, wanted)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    gradients = [torch.autograd.grad((y * weight).sum(), leaves) for y in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_factors_of_two_dtypes_meet_in_the_wider() -> None:
    narrow, wide = thins((2,), (1.0,), torch.bfloat16), thins((2,), (1.0,), torch.float32)
    x = torch.ones(2, IN, dtype=torch.bfloat16)
    found = grouped_low_rank(x, narrow + wide, [1, 1])
    assert found.dtype == torch.float32
    wanted = plain(x.float(), [(A.float(), B.float(), s) for A, B, s in narrow + wide], [1, 1])
    torch.testing.assert_close(found, wanted)
