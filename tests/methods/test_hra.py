"""HRA by its paper: the compact product against reflections made one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import HRAConfig, PeftcError, PeftcWarning, PeftModel, get_peft_model


def wrapped(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(layer or nn.Linear(6, 5)).double()
    return get_peft_model(base, HRAConfig(**{"r": 4, "target_modules": ["0"], **options}))


def columns(model: PeftModel) -> nn.Parameter:
    return model.get_base_model()[0].hra_u["default"]


def reflections(u: Tensor) -> Tensor:
    """`H_1 ... H_r`, multiplied one by one."""
    product = torch.eye(u.shape[0], dtype=u.dtype)
    for column in u.unbind(1):
        unit = column / column.norm()
        product = product @ (torch.eye(u.shape[0], dtype=u.dtype) - 2 * torch.outer(unit, unit))
    return product


@pytest.mark.parametrize("r", [1, 2, 4, 5])
def test_the_formula(r: int) -> None:
    model = wrapped(r=r, init_weights=False)
    base, x = model.get_base_model()[0].base_layer, torch.randn(3, 6).double()
    expected = x @ (base.weight @ reflections(columns(model))).T + base.bias
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_reflections_of_a_convolution_act_on_its_patches() -> None:
    model = wrapped(nn.Conv2d(3, 5, 2, padding=1), init_weights=False)
    base, x = model.get_base_model()[0].base_layer, torch.randn(2, 3, 4, 4).double()
    assert columns(model).shape == (12, 4)
    weight = (base.weight.flatten(1) @ reflections(columns(model))).view_as(base.weight)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, weight, base.bias, padding=1))


def test_gram_schmidt_reflects_along_orthogonal_directions() -> None:
    model = wrapped(init_weights=False, apply_GS=True)
    base, x = model.get_base_model()[0].base_layer, torch.randn(3, 6).double()
    basis, triangle = torch.linalg.qr(columns(model))
    expected = x @ (base.weight @ reflections(basis * triangle.diagonal().sign())).T + base.bias
    torch.testing.assert_close(model(x), expected)


def test_the_weight_keeps_its_singular_values() -> None:
    model = wrapped(init_weights=False)
    before = torch.linalg.svdvals(model.get_base_model()[0].base_layer.weight)
    torch.testing.assert_close(torch.linalg.svdvals(model.merge_and_unload()[0].weight), before)


def test_pairs_cancel_at_the_start() -> None:
    u = columns(wrapped())
    assert torch.equal(u[:, 0::2], u[:, 1::2])
    assert not torch.equal(u[:, 0], u[:, 2])


@pytest.mark.parametrize("options", [{"r": 3}, {"apply_GS": True}])
def test_a_start_that_is_not_the_identity_is_warned_of(options: dict[str, Any]) -> None:
    with pytest.warns(PeftcWarning, match="PC104"):
        wrapped(**options)


def test_more_reflections_than_inputs_are_warned_of() -> None:
    with pytest.warns(PeftcWarning, match="PC402"):
        wrapped(r=8)


def test_a_kind_of_bias_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PeftcError, match="PC102"):
        wrapped(bias="some")


def test_biases_of_adapted_layers_train_along() -> None:
    trained = {name for name, p in wrapped(bias="hra_only").named_parameters() if p.requires_grad}
    assert trained == {"base_model.model.0.base_layer.bias", "base_model.model.0.hra_u.default"}
