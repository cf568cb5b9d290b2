"""IA3 by its paper: what is rescaled where, and where the vectors start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peftc import IA3Config, PeftModel, get_peft_model
from peftc.diagnostics import ConfigError


def wrapped(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(layer or nn.Linear(6, 5))
    return get_peft_model(base, IA3Config(**{"target_modules": ["0"], "feedforward_modules": [], **options}))


def vector(model: PeftModel) -> nn.Parameter:
    return model.get_base_model()[0].ia3_l["default"]


def test_outputs_are_rescaled_with_their_bias() -> None:
    model = wrapped()
    with torch.no_grad():
        vector(model).normal_()
    x, base = torch.randn(3, 6), model.get_base_model()[0].base_layer
    assert vector(model).shape == (5, 1)
    expected = vector(model).flatten() * base(x)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_inputs_of_feedforward_layers_are_rescaled() -> None:
    model = wrapped(feedforward_modules=["0"])
    with torch.no_grad():
        vector(model).normal_()
    x, base = torch.randn(3, 6), model.get_base_model()[0].base_layer
    assert vector(model).shape == (1, 6)
    expected = base(vector(model).flatten() * x)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("feedforward", [[], ["0"]])
def test_channels_of_a_convolution_are_rescaled(feedforward: list[str]) -> None:
    model = wrapped(nn.Conv2d(4, 6, 3, groups=2), feedforward_modules=feedforward)
    with torch.no_grad():
        vector(model).normal_()
    x, base = torch.randn(2, 4, 5, 5), model.get_base_model()[0].base_layer
    scale = vector(model).reshape(1, -1, 1, 1)
    expected = base(scale * x) if feedforward else scale * base(x)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_vectors_start_at_one_or_at_random() -> None:
    assert bool((vector(wrapped()) == 1).all())
    assert not bool((vector(wrapped(init_ia3_weights=False)) == 1).any())


def test_feedforward_layers_must_be_targets() -> None:
    with pytest.raises(ConfigError, match="feedforward_modules"):
        IA3Config(target_modules=["a"], feedforward_modules=["b"])
