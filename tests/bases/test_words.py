"""Numbers of a few bits in words, and grids of scales and zeros: GPTQ and AWQ on the stand-ins, in every form that files have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peftc_plugins.storages import awq, gptq, words
from peftc_plugins.storages.awq import Awq
from peftc_plugins.storages.gptq import Gptq
from torch import Tensor, nn

from peftc import PeftcError, get_peft_model, rules
from peftc.runtime.bases.places import change
from peftc.runtime.bases.storages import storage_of
from tests.bases import standins
from tests.bases.standins import AwqTorchLinear, TorchQuantLinear
from tests.defects import put_defect
from tests.runtime.methods import narrow

Patch = pytest.MonkeyPatch


def linear(into: int = 64, out: int = 32, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(into, out, bias)


def inputs() -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_come_back_from_words(bits: int, dtype: torch.dtype) -> None:
    fields = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    like = torch.empty(64 * bits // (torch.iinfo(dtype).bits), 5, dtype=dtype)
    made = words.gather(fields, bits, like)
    assert made.dtype == dtype and made.shape == like.shape
    assert torch.equal(words.spread(made, bits), fields.int())
    if dtype == torch.int32 and bits != 3:
        assert torch.equal(made, standins.gather(fields, bits, 0))


def test_three_bits_lie_as_in_files_ten_and_a_part() -> None:
    x = torch.randint(0, 8, (32, 4), generator=torch.Generator().manual_seed(0))
    first = sum(x[i] << (3 * i) for i in range(10)) | (x[10] & 3) << 30
    second = x[10] >> 2 | sum(x[11 + i] << (3 * i + 1) for i in range(10)) | (x[21] & 1) << 31
    third = x[21] >> 1 | sum(x[22 + i] << (3 * i + 2) for i in range(10))
    wanted = torch.stack([first, second, third])
    wanted = torch.where(wanted >= 2**31, wanted - 2**32, wanted).int()
    assert torch.equal(words.gather(x, 3, torch.empty(3, 4, dtype=torch.int32)), wanted)


def test_a_grid_stays_where_it_fits_and_widens_where_it_would_clip() -> None:
    scales, zeros = torch.tensor([[0.1, 0.1]]), torch.tensor([[8, 8]])
    group = torch.zeros(4, dtype=torch.long)
    W = torch.tensor([[-0.8, 0.0], [0.1, 0.3], [0.7, 1.4], [0.2, -0.1]])
    codes, chosen, kept = words.on_grid(W, group, scales, zeros, 15, None)
    torch.testing.assert_close(chosen, torch.tensor([[0.1, 0.2]]))
    assert codes[:, 0].tolist() == [0, 9, 15, 10] and codes[2, 1] == 15 and torch.equal(kept, zeros)
    codes, chosen, moved = words.on_grid(W, group, scales, zeros, 15, 0)
    torch.testing.assert_close(chosen, torch.tensor([[0.1, 0.1]]))
    assert moved.tolist() == [[8, 1]] and codes[:, 1].tolist() == [1, 4, 15, 0]
    assert words.on_grid(W.abs(), group, scales, zeros, 15, 1)[2].min() == 1


def test_a_grid_of_nothing_gives_numbers() -> None:
    group, zeros = torch.zeros(4, dtype=torch.long), torch.tensor([[0, 15]])
    codes, chosen, kept = words.on_grid(torch.zeros(4, 2), group, torch.zeros(1, 2), zeros, 15, 0)
    assert chosen.eq(0).all() and codes.tolist() == [[0, 15]] * 4 and torch.equal(kept, zeros)


class FirstFormat(TorchQuantLinear):
    """A layer with zeros stored less one, as files have them."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.qzeros = standins.gather(standins.spread(self.qzeros, self.bits, 1) - 1, self.bits, 1)

    def qzero_format(self) -> int:
        return 1

    def dequantize_weight(self, num_itr: int = 1) -> Tensor:
        zeros, group = standins.spread(self.qzeros, self.bits, 1) + 1, self.g_idx.long()
        return self.scales[group] * (standins.spread(self.qweight, self.bits, 0) - zeros[group])


def act_order(layer: Any) -> Any:
    """Groups of inputs that were taken in order of their activations, one of them counted from the end."""
    layer.g_idx = layer.g_idx[torch.randperm(64, generator=torch.Generator().manual_seed(2))].contiguous()
    layer.g_idx[layer.g_idx == 1] -= 2
    return layer


def symmetric(layer: Any) -> Any:
    layer.sym = True
    return layer


FORMS = {
    "4 bits": lambda: TorchQuantLinear(linear()),
    "2 bits": lambda: TorchQuantLinear(linear(), 2, 32),
    "8 bits": lambda: TorchQuantLinear(linear(), 8, 64),
    "zeros less one": lambda: FirstFormat(linear()),
    "act-order": lambda: act_order(TorchQuantLinear(linear())),
    "act-order, zeros less one": lambda: act_order(FirstFormat(linear())),
    "symmetric": lambda: symmetric(TorchQuantLinear(linear(), 8, 32)),
    "half precision": lambda: TorchQuantLinear(linear()).half(),
    "awq": lambda: AwqTorchLinear(linear()),
    "awq, half precision": lambda: AwqTorchLinear(linear()).half(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_opened_as_the_layer_has_it_and_packed_again_to_the_same_words(form: str) -> None:
    layer: Any = FORMS[form]()
    storage = storage_of(layer)
    assert storage is not None and storage.name == ("awq" if "awq" in form else "gptq")
    opened = storage.open(layer)
    torch.testing.assert_close(opened, layer.opened().t(), rtol=0, atol=0)
    facts = storage.facts(layer.to("meta"))
    assert (facts.in_features, facts.out_features) == tuple(opened.shape[::-1]) and facts.nbytes == sum(
        t.numel() * t.element_size() for t in layer.buffers()
    )
    assert facts.dtype == str(opened.dtype).removeprefix("torch.")
    layer = FORMS[form]()
    made = storage.pack(layer, opened)
    assert all(torch.equal(tensor, getattr(layer, name)) for name, tensor in made.items()) and "qweight" in made
    other = opened * 1.7 + 0.1 * opened.abs().amax() * inputs()[:1].to(opened.dtype)
    low = other.abs().amax() / (2**layer.bits if "awq" not in form else 16)
    change(layer, storage.pack(layer, other))
    assert (storage.open(layer) - other).abs().max() < low * (4 if "2 bits" in form else 2)
    torch.testing.assert_close(layer.opened().t(), storage.open(layer), rtol=0, atol=0)
    if form == "symmetric":
        assert torch.equal(layer.qzeros, FORMS[form]().qzeros)


class Elsewhere(TorchQuantLinear):
    """A kernel that has packed the words in its own way."""

    __module__ = "gptqmodel.nn_modules.qlinear.marlin"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.qweight = self.qweight.flip(0).contiguous()

    def opened(self) -> Tensor:
        zeros, group = standins.spread(self.qzeros, self.bits, 1), self.g_idx.long()
        return self.scales[group] * (standins.spread(self.qweight.flip(0), self.bits, 0) - zeros[group])


class AwqElsewhere(AwqTorchLinear):
    """The same of AWQ."""

    __module__ = "gptqmodel.nn_modules.qlinear.awq_marlin"


@pytest.mark.parametrize("cls", [Elsewhere, AwqElsewhere])
def test_another_kernel_is_opened_by_its_calls_and_takes_no_other_weight(cls: Any) -> None:
    model = nn.Sequential(cls(linear(bias=True)))
    layer, storage = model[0], storage_of(model[0])
    bias = layer.__dict__.pop("bias")
    layer.register_buffer("bias", bias)  # as the package has it
    assert storage is not None and cls.__name__ in storage.cannot_pack(layer)
    torch.testing.assert_close(storage.open(layer), layer.opened().t(), rtol=0, atol=1e-6)
    tuned = get_peft_model(model, narrow(target_modules=["0"], r=2))
    y = tuned.eval()(inputs())
    with pytest.raises(PeftcError, match=cls.__name__) as caught:
        tuned.merge_adapter()
    assert caught.value.diagnostics[0].code == rules.PACKED_FOR_GOOD.code and torch.equal(tuned(inputs()), y)


@pytest.mark.parametrize(
    ("module", "before", "after", "form"),
    [
        (gptq, "return 1 if layer.qzero_format() == 1 else 0", "return 0", "zeros less one"),
        (gptq, "None if layer.sym else less", "less", "symmetric"),
        (gptq, "layer.g_idx.long() % layer.scales.shape[0]", "layer.g_idx.long()", "act-order"),
        (awq, "return _taken(rows, list(ORDER))", "return rows", "awq"),
        (words, "torch.where(nearer, scale, own)", "own", "4 bits"),
        (words, "torch.where(nearer, scale, own)", "scale", "4 bits"),
    ],
)
def test_these_tests_find_defects(monkeypatch: Patch, module: Any, before: str, after: str, form: str) -> None:
    put_defect(monkeypatch, module, before, after)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        test_a_weight_is_opened_as_the_layer_has_it_and_packed_again_to_the_same_words(form)
        test_a_grid_stays_where_it_fits_and_widens_where_it_would_clip()


def test_the_storages_are_the_installed_ones() -> None:
    assert isinstance(storage_of(TorchQuantLinear(linear())), Gptq) and isinstance(
        storage_of(AwqTorchLinear(linear())), Awq
    )
