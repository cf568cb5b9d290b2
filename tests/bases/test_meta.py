"""Facts of layers that their library made on the meta device: those of the same layers with numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from peftc.runtime.bases.storages import packed_facts
from tests.bases.made import installed


def by_torchao(name: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from torchao import quantization

        model = nn.Sequential(layer)
        quantization.quantize_(model, getattr(quantization, name)())
        return model[0]

    return make


def by_quanto(name: str, frozen: bool = True) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from optimum import quanto

        made = quanto.QLinear.from_module(layer, weights=quanto.qtypes[name])
        assert made is not None
        if frozen or not layer.weight.is_meta:
            made.freeze()
        return made

    return make


MAKES = {
    "torchao int8": ("torchao", by_torchao("Int8WeightOnlyConfig")),
    "torchao int8 dynamic": ("torchao", by_torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao float8": ("torchao", by_torchao("Float8WeightOnlyConfig")),
    "torchao intx": ("torchao", by_torchao("IntxWeightOnlyConfig")),
    "quanto int8": ("optimum.quanto", by_quanto("qint8")),
    "quanto int4": ("optimum.quanto", by_quanto("qint4")),
    "quanto float8": ("optimum.quanto", by_quanto("qfloat8_e4m3fn")),
    "quanto int8, to be loaded": ("optimum.quanto", by_quanto("qint8", frozen=False)),
    "quanto int4, to be loaded": ("optimum.quanto", by_quanto("qint4", frozen=False)),
    "quanto int2, to be loaded": ("optimum.quanto", by_quanto("qint2", frozen=False)),
}


@pytest.mark.parametrize("name", MAKES)
def test_they_are_those_of_layers_with_numbers(name: str) -> None:
    package, make = MAKES[name]
    if not installed(package):
        pytest.skip(f"the package {package} is not installed")
    there, nowhere = (make(nn.Linear(256, 96, bias=False, device=device)) for device in ("cpu", "meta"))
    assert next(nowhere.parameters()).is_meta
    found = packed_facts(nowhere)
    assert found is not None and found == packed_facts(there)
    assert found.nbytes < 256 * 96 * torch.float32.itemsize / 2
