"""Every base of the table is what it says: made in no time, runs, lets gradients through or not; stand-ins keep their layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.bases.made import BASES, FIRST, IDS, LINEARS, Base, loaded
from tests.bases.standins import gather, ordered, spread

EVERY = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


@EVERY
def test_every_linear_layer_is_stored_so_and_nothing_else(base: Base, tmp_path: Path) -> None:
    model = base.made(tmp_path)
    first = model.get_submodule(FIRST)
    kinds = {kind(layer) for name, layer in model.named_modules() if name.rpartition(".")[2] in LINEARS}
    assert kinds == {kind(first)} and kind(first) != kind(nn.Linear(1, 1))
    assert type(model.lm_head.weight) is nn.Parameter and model.lm_head.weight.dtype == base.dtype


def kind(layer: nn.Module) -> tuple[object, ...]:
    """What tells a stored layer: its class and those of its tensors."""
    return type(layer), *sorted((name, type(t).__name__, str(t.dtype)) for name, t in layer.named_parameters())


@EVERY
def test_the_model_runs_close_to_the_float_one_and_gradients_flow_as_said(base: Base, tmp_path: Path) -> None:
    if base.runs:
        pytest.skip(f"{base.name}: {base.runs}")
    model = base.made(tmp_path).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    assert abs(float(loss) - float(loaded()(input_ids=IDS, labels=IDS).loss)) < 0.05
    x = torch.randn(12, 64, dtype=base.dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = model.get_submodule(FIRST)(x)
    assert out.dtype == base.dtype
    if base.flows:
        out.sum().backward()
        assert x.grad is not None and float(x.grad.abs().sum()) > 0
    else:
        with pytest.raises(RuntimeError, match=r"derivative|does not require grad"):
            out.sum().backward()


@EVERY
def test_the_same_model_is_made_every_time(base: Base, tmp_path: Path) -> None:
    if base.runs:
        pytest.skip(f"{base.name}: {base.runs}")
    first, second = (base.made(tmp_path / name).train()(input_ids=IDS).logits for name in ("first", "second"))
    assert torch.equal(first, second)


def test_words_and_fields_of_the_stand_ins_are_each_others_reverse() -> None:
    for bits in (2, 4, 8):
        for dim in (0, 1):
            fields = torch.randint(0, 2**bits, (32, 64), generator=torch.Generator().manual_seed(bits))
            words = gather(fields, bits, dim)
            assert words.dtype == torch.int32 and words.shape[dim] == fields.shape[dim] * bits // 32
            assert torch.equal(spread(words, bits, dim), fields.to(torch.int32))
    row = torch.arange(16).reshape(1, 16)
    assert ordered(row)[0, :8].tolist() == [0, 2, 4, 6, 1, 3, 5, 7] and torch.equal(
        ordered(ordered(row), back=True), row
    )


def test_a_missing_package_is_named_and_skips() -> None:
    base = Base("made-up", "no_such.package", lambda folder: nn.Linear(1, 1))
    assert base.missing() == "made-up: the package no_such.package is not installed"
    with pytest.raises(pytest.skip.Exception, match="no_such"):
        base.made(Path())
