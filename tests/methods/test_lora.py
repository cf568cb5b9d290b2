"""LoRA by its paper: the formula, both scalings, starts, dropout, and what this version refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import LoraConfig, LoraModel, PeftcError, PeftcWarning, PeftModel, get_peft_model

WIDTH = 16

#: A value of each option that is not available, other than "off".
ASKED: dict[str, Any] = {}


def wrapped(seed: int = 0, layer: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    base = nn.Sequential(layer or nn.Linear(WIDTH, WIDTH))
    return get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["0"], **options}))


def factors(model: PeftModel) -> tuple[Tensor, Tensor]:
    layer = model.get_base_model()[0]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("stable", [False, True])
def test_the_formula(stable: bool) -> None:
    model = wrapped(lora_alpha=6, use_rslora=stable)
    a, b = factors(model)
    with torch.no_grad():
        b.normal_()
    x = torch.randn(3, WIDTH)
    base = model.get_base_model()[0].base_layer
    scale = 6 / (math.sqrt(4) if stable else 4)
    expected = x @ (base.weight + scale * b @ a).T + base.bias
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_the_update_starts_at_zero_beside_a_random_factor() -> None:
    a, b = factors(wrapped())
    bound = 1 / math.sqrt(WIDTH)  # He's with a = sqrt(5)
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.8 * bound
    assert not b.any()


def test_a_gaussian_start() -> None:
    a, b = factors(wrapped(layer=nn.Linear(4096, 8), init_lora_weights="gaussian", r=2))
    assert float(a.detach().std()) == pytest.approx(1 / 2, rel=0.05)
    assert not b.any()


def test_a_random_start_changes_the_model() -> None:
    model = wrapped(init_lora_weights=False)
    x = torch.randn(2, WIDTH)
    with model.disable_adapter():
        base = model(x)
    assert not torch.allclose(model(x), base)


def test_an_embedding_starts_with_the_other_factor_at_zero() -> None:
    layer = wrapped(layer=nn.Embedding(10, WIDTH)).get_base_model()[0]
    assert not layer.lora_embedding_A["default"].any()
    assert layer.lora_embedding_B["default"].all()


def test_patterns_give_layers_their_own_rank_and_scaling() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "1"], rank_pattern={"1": 2}, alpha_pattern={"0": 8})
    layers = get_peft_model(base, config).get_base_model()
    assert [layer.lora_A["default"].weight.shape[0] for layer in layers] == [4, 2]
    assert [layer.scaling["default"] for layer in layers] == [8 / 4, 4 / 2]


def test_dropout_acts_on_the_update_in_training_only() -> None:
    model = wrapped(lora_dropout=0.5)
    a, b = factors(model)
    with torch.no_grad():
        b.normal_()
    x = torch.randn(64, WIDTH)
    base = model.get_base_model()[0].base_layer
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(7)
    y = model(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, base(x) + 2.0 * dropped @ a.T @ b.T)


def test_dropout_leaves_ids_alone() -> None:
    model = wrapped(layer=nn.Embedding(10, WIDTH), lora_dropout=0.5).train()
    assert model(torch.tensor([1, 2])).shape == (2, WIDTH)


def test_the_scale_can_be_set() -> None:
    model = wrapped()
    _, b = factors(model)
    with torch.no_grad():
        b.normal_()
    layer, x = model.get_base_model()[0], torch.randn(2, WIDTH)
    with model.disable_adapter():
        base = model(x)
    update = model(x) - base
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(model(x) - base, 0.5 * update)
    layer.scale_layer(4.0)
    torch.testing.assert_close(model(x) - base, 2 * update)
    layer.unscale_layer(2.0)
    torch.testing.assert_close(model(x) - base, update)
    layer.scale_layer(3.0)
    layer.unscale_layer()
    torch.testing.assert_close(model(x) - base, update)


def test_the_delta_of_a_layer() -> None:
    model = wrapped(lora_alpha=12)
    a, b = factors(model)
    with torch.no_grad():
        b.normal_()
    torch.testing.assert_close(model.get_base_model()[0].get_delta_weight("default"), 3 * b @ a)


def test_a_rank_beyond_the_layer_is_warned_of() -> None:
    with pytest.warns(PeftcWarning, match="PC402"):
        wrapped(r=WIDTH + 1)


def test_a_rank_that_groups_cannot_share_is_refused() -> None:
    with pytest.raises(PeftcError, match="PC401"):
        wrapped(layer=nn.Conv1d(4, 4, 3, groups=2), r=3)


def test_public_names() -> None:
    assert isinstance(wrapped().base_model, LoraModel)
