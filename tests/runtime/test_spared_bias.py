"""A method that scales what a layer multiplies and not what it adds: alone, nested, merged, by rows, and in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftModel, get_peft_model
from peftc.plugin import CONV_KINDS, LINEAR_KINDS
from peftc.registry.manager import default_registry
from tests.runtime.methods import StretchTuner, narrow, stretch
from tests.unit.fakes import plugin

ROWS = torch.linspace(-1, 1, 24).view(4, 6)


class Sparing(StretchTuner):
    """`y = l * (W x) + b`."""

    supports = LINEAR_KINDS | CONV_KINDS
    spares_bias = True


@pytest.fixture(autouse=True)
def _sparing() -> Iterator[None]:
    registry = default_registry()
    method = registry.get("STRETCH")
    registry.register(plugin(replace(method, tuner=Sparing())), "stretch")
    yield
    registry.register(plugin(method), "stretch")


def wrapped(layer: nn.Module) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(layer), stretch(target_modules=["0"]))


def test_the_bias_is_added_as_it_is() -> None:
    model = wrapped(nn.Linear(6, 5))
    layer = model.get_base_model()[0]
    expected = layer.stretch_l["default"] * (ROWS @ layer.weight.T) + layer.bias
    torch.testing.assert_close(model(ROWS), expected)
    torch.testing.assert_close(model.merge_and_unload()(ROWS), expected)


def test_a_layer_without_a_bias_is_scaled() -> None:
    model = wrapped(nn.Linear(6, 5, bias=False))
    layer = model.get_base_model()[0]
    torch.testing.assert_close(model(ROWS), layer.stretch_l["default"] * (ROWS @ layer.weight.T))


def test_channels_of_a_convolution_are_scaled_likewise() -> None:
    model, x = wrapped(nn.Conv2d(3, 5, 3)), torch.randn(2, 3, 6, 6)
    layer = model.get_base_model()[0]
    weight = layer.stretch_l["default"].view(5, 1, 1, 1) * layer.weight
    expected = nn.functional.conv2d(x, weight, layer.bias)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_several_scale_one_after_the_other() -> None:
    model = wrapped(nn.Linear(6, 5))
    model.add_adapter("other", stretch(target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    layer = model.get_base_model()[0]
    expected = layer.stretch_l["other"] * layer.stretch_l["default"] * (ROWS @ layer.weight.T) + layer.bias
    torch.testing.assert_close(model(ROWS), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(ROWS), expected)


def test_a_bias_that_a_method_below_changed_is_spared_as_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), narrow(target_modules=["0"]), "below", mixed=True)
    model.add_adapter("above", stretch(target_modules=["0"]))
    model.set_adapter(["below", "above"])
    layer = model.base_model.model[0]
    monkeypatch.setattr(type(layer.base_layer.part("below").tuner), "lowerings", frozenset({"params"}))
    monkeypatch.setattr(
        type(layer.base_layer.part("below").tuner), "params", lambda self, a, p, p0: {**p, "bias": p["bias"] + 1}
    )
    model.set_adapter(["below", "above"])
    inner = layer.get_base_layer()
    expected = layer.stretch_l["above"] * (ROWS @ inner.weight.T) + inner.bias + 1
    torch.testing.assert_close(model(ROWS), expected)


def test_rows_of_a_batch_are_as_alone() -> None:
    model = wrapped(nn.Linear(6, 5))
    model.add_adapter("other", stretch(target_modules=["0"]))
    alone: dict[str, Tensor] = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(ROWS)
    with model.disable_adapter():
        alone["__base__"] = model(ROWS)
    names = ["other", "default", "__base__", "default"]
    found = model(ROWS, adapter_names=names)
    torch.testing.assert_close(found, torch.stack([alone[name][row] for row, name in enumerate(names)]))


def test_a_bias_that_trains_gets_the_whole_gradient() -> None:
    model = wrapped(nn.Linear(6, 5))
    bias = model.get_base_model()[0].bias
    bias.requires_grad_(True)
    model(ROWS).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((5,), 4.0))
