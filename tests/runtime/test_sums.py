"""Sums of a weight and products of thin factors: the same bits by rows of a file and in memory, whatever the threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peftc.runtime.layer import sums as module
from peftc.runtime.layer.sums import Sums, one_thread
from tests.defects import put_defect


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def made(rows: int, columns: int, rank: int, count: int = 1) -> tuple[Sums, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    terms = [(drawn(rows, rank), drawn(rank, columns), 0.3 + place) for place in range(count)]
    return Sums(terms, torch.float32, False), drawn(rows, columns).bfloat16()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 8, 37])
@pytest.mark.parametrize("rows, columns", [(1, 1), (1000, 7), (64, 5632), (127, 333), (700, 2048), (3, 70_000), (0, 4)])
def test_sums_are_rounded_once(rows: int, columns: int, rank: int, count: int) -> None:
    sums, weight = made(rows, columns, rank, count)
    out = torch.empty_like(weight)
    torch.set_num_threads(1)
    assert sums.whole(weight, out, check=True)
    expected = weight.float()
    for left, right, scale in sums.terms:
        expected = (left @ right) * scale + expected
    assert torch.allclose(out.float(), expected, rtol=2**-8, atol=1e-5)
    sums.whole(weight, weight)  # in its own memory
    assert torch.equal(weight, out)


@pytest.mark.parametrize("rank", [2, 8, 37, 64])
def test_the_number_of_threads_changes_no_bits(rank: int) -> None:
    sums, weight = made(1000, 5632, rank)
    weight = weight.float()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = torch.empty_like(weight)
        sums.whole(weight, out)
        found.append(out)
        assert torch.get_num_threads() == threads
    assert torch.equal(*found)


def test_threads_are_as_before_after_an_error() -> None:
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 2


def test_what_is_not_finite_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, weight = made(700, 2048, 8)
    weight[-1, -1] = float("inf")
    assert not sums.whole(weight, torch.empty_like(weight), check=True)
    weight[-1, -1] = 0
    large = torch.full((2, 2), 3e38)
    assert module.is_finite(large)  # though their sum is not
    put_defect(monkeypatch, module, "or bool(torch.isfinite(tensor).all())", "")
    assert not module.is_finite(large)
