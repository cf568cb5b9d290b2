"""Storages of packages that do not run here, on layers of their documented shape: AQLM, EETQ, transformer-engine, FP8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc import PeftcError, get_peft_model, rules
from peftc.runtime.bases.places import change
from peftc.runtime.bases.storages import storage_of
from tests.runtime.methods import narrow, stretch

Patch = pytest.MonkeyPatch


def weight(out: int = 24, into: int = 40) -> Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(0)) / 10


class QuantizedLinear(nn.Module):
    """AQLM's layer: books of vectors, codes with a sign, a scale for each group of outputs."""

    __module__ = "aqlm.inference"

    def __init__(self, out: int = 16, into: int = 32, group: tuple[int, int] = (2, 8), bits: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features, self.gemv_op = into, out, None
        draw = torch.Generator().manual_seed(0)
        self.codebooks = nn.Parameter(torch.randn(3, 2**bits, *group, generator=draw))
        codes = torch.randint(0, 2**bits, (out // group[0], into // group[1], 3), generator=draw)
        self.codes = nn.Parameter(
            torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8), requires_grad=False
        )
        self.scales = nn.Parameter(torch.rand(out // group[0], 1, 1, 1, generator=draw))
        self.bias = nn.Parameter(torch.ones(out))
        rows = []
        for i in range(out // group[0]):
            blocks = [sum(self.codebooks[k, codes[i, j, k]] for k in range(3)) for j in range(into // group[1])]
            rows.append(torch.cat(blocks, 1) * self.scales[i, 0])
        self.wanted = torch.cat(rows).detach()

    def forward(self, x: Tensor) -> Tensor:
        if self.gemv_op is None:
            self.codes.data, self.gemv_op = self.codes.data.permute(1, 0, 2).contiguous(), len
        return F.linear(x, self.wanted, self.bias)


@pytest.mark.parametrize("sizes", [(16, 32), (16, 64), (8, 64)])
def test_aqlm_is_opened_before_and_after_its_first_call_and_takes_no_other(sizes: tuple[int, int]) -> None:
    model = nn.Sequential(QuantizedLinear(*sizes))
    layer, storage = model[0], storage_of(model[0])
    assert storage is not None and storage.name == "aqlm"
    torch.testing.assert_close(storage.open(layer), layer.wanted)
    layer(torch.zeros(1, sizes[1]))
    torch.testing.assert_close(storage.open(layer), layer.wanted)
    tuned = get_peft_model(model, narrow(target_modules=["0"], r=2))
    tuned(torch.ones(2, sizes[1])).sum().backward()
    with pytest.raises(PeftcError, match="learned from data") as caught:
        tuned.merge_adapter()
    assert caught.value.diagnostics[0].code == rules.PACKED_FOR_GOOD.code


class Kernel:
    """A kernel of EETQ: numbers of 8 bits in an order of its own, here the reverse."""

    @staticmethod
    def quant_weights(columns: Tensor, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
        scales = columns.abs().amax(0) / 127
        return (columns / scales).round().to(dtype).flip(0), scales

    @staticmethod
    def w8_a16_gemm(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return x @ (codes.flip(0) * scales)


@pytest.mark.parametrize("bias", [False, True])
def test_eetq_is_opened_by_its_calls_and_packed_by_its_kernel(monkeypatch: Patch, bias: bool) -> None:
    from transformers.integrations import eetq

    monkeypatch.setattr(eetq, "eetq_kernels_hub", Kernel, raising=False)
    layer = eetq.EetqLinear(40, 24, bias=bias).float()
    codes, layer.weight_scales.data = Kernel.quant_weights(weight().t(), torch.int8, False)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    if bias:
        layer.bias.data.fill_(3.0)
    storage = storage_of(layer)
    assert storage is not None and storage.name == "eetq"
    facts = storage.facts(layer)
    assert (facts.in_features, facts.out_features, facts.nbytes) == (40, 24, 40 * 24 + 24 * 4)
    opened = storage.open(layer)
    assert (opened - weight()).abs().max() < 0.003
    change(layer, storage.pack(layer, opened))
    torch.testing.assert_close(storage.open(layer), opened)
    change(layer, storage.pack(layer, weight() * 2))
    assert (storage.open(layer) - weight() * 2).abs().max() < 0.006
    layer.weight = nn.Parameter(weight().t())
    assert storage_of(layer) is None


class Linear(nn.Module):
    """transformer-engine's layer: a plain weight, an empty tensor where there is no bias, and what it is told."""

    __module__ = "transformer_engine.pytorch.module.linear"

    def __init__(self, bias: bool, tp_size: int = 1, return_bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = 40, 24
        self.tp_size, self.return_bias = tp_size, return_bias
        self.weight = nn.Parameter(weight())
        self.weight.tensor_model_parallel = True
        if bias:
            self.bias = nn.Parameter(torch.ones(24))
        else:
            self.bias = torch.Tensor()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return F.linear(inp, self.weight, self.bias if self.bias.numel() else None)


@pytest.mark.parametrize("config", [narrow, stretch])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_transformer_engine_do_what_plain_ones_do(bias: bool, config: Any) -> None:
    plain = nn.Linear(40, 24, bias)
    plain.weight = nn.Parameter(weight())
    if bias:
        plain.bias = nn.Parameter(torch.ones(24))
    models = []
    for layer in (Linear(bias), plain):
        model = get_peft_model(nn.Sequential(layer), config(target_modules=["0"]))
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                tensor.data.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(name))) + 0.1)
        models.append(model.eval())
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    first, second = (model(x) for model in models)
    torch.testing.assert_close(first, second)
    for model in models:
        model.merge_adapter()
    inner = models[0].base_model.model[0].get_base_layer()
    torch.testing.assert_close(inner.weight, models[1].base_model.model[0].get_base_layer().weight)
    assert inner.weight.tensor_model_parallel and not inner.weight.requires_grad
    models[0].unmerge_adapter()
    assert torch.equal(inner.weight, weight())


@pytest.mark.parametrize("told", [{"tp_size": 2}, {"return_bias": True}])
def test_layers_of_transformer_engine_that_give_something_else_are_left_alone(told: dict[str, Any]) -> None:
    assert storage_of(Linear(True)) is not None and storage_of(Linear(True, **told)) is None


@pytest.mark.parametrize("scheme", ["blocks", "uneven blocks", "one", "powers of two"])
def test_fp8_is_opened_and_packed_in_each_form_of_scales(scheme: str) -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear, _dequantize_fp8_weight

    block = {"blocks": (8, 8), "uneven blocks": (16, 32), "one": None, "powers of two": (8, 8)}[scheme]
    layer = FP8Linear(40, 24, block, scale_fmt="ue8m0" if scheme == "powers of two" else "float")
    storage = storage_of(layer)
    assert storage is not None and storage.name == "fine-grained-fp8"
    change(layer, storage.pack(layer, weight()))
    opened = storage.open(layer)
    assert (opened - weight()).abs().max() < weight().abs().max() / 15
    own = _dequantize_fp8_weight(layer.weight.data, layer.weight_scale_inv.data, block, torch.float32)
    torch.testing.assert_close(opened, own, rtol=0, atol=0)
    for tensor in storage.pack(layer, weight()).values():
        assert not tensor.requires_grad
    kept = {name: getattr(layer, name).float() for name in storage.held}
    change(layer, storage.pack(layer, opened))
    torch.testing.assert_close(storage.open(layer), opened, rtol=0, atol=1e-7)
    assert all(getattr(layer, name).shape == kept[name].shape for name in kept)
    scale = layer.weight_scale_inv
    assert storage.facts(layer.to("meta")).nbytes == 40 * 24 + scale.numel() * scale.element_size()


def test_fp4_in_layers_of_fp8_is_left_alone() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer: Any = FP8Linear(40, 24, (8, 8))
    layer.weight = nn.Parameter(torch.zeros(24, 20, dtype=torch.int8), requires_grad=False)
    assert storage_of(layer) is None


def test_layerwise_casting_of_a_weight_beyond_the_range_gives_numbers() -> None:
    pytest.importorskip("diffusers")
    from diffusers.hooks import apply_layerwise_casting

    model = nn.Sequential(nn.Linear(40, 24, dtype=torch.bfloat16))
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=())
    storage = storage_of(model[0])
    assert storage is not None and storage.name == "layerwise-casting"
    made = storage.pack(model[0], torch.full((24, 40), 1e4))["weight"]
    assert made.dtype == torch.float8_e4m3fn and made.float().eq(448).all()
    tuned = get_peft_model(model, narrow(target_modules=["0"], r=2))
    tuned(torch.ones(2, 40, dtype=torch.bfloat16)).sum().backward()
    dtypes = {tensor.dtype for name, tensor in tuned.named_parameters() if "narrow" in name}
    assert dtypes and torch.float8_e4m3fn not in dtypes
