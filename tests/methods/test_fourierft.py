"""FourierFT: the formula on every kind of layer, places from the seed alone, and files of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from peftc import FourierFTConfig, PeftcError, PeftModel, get_peft_model


def wrapped(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(layer or nn.Linear(6, 5))
    return get_peft_model(base, FourierFTConfig(**{"n_frequency": 7, "target_modules": ["0"], **options}))


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(2, 3, 2), nn.Embedding(9, 4)]
)
def test_the_formula(layer: nn.Module) -> None:
    weight = layer.weight.detach().clone()
    model = wrapped(layer, random_loc_seed=3)
    logical = weight.t() if isinstance(layer, nn.Embedding) else weight.flatten(1)
    places = torch.randperm(logical.numel(), generator=torch.Generator().manual_seed(3))[:7]
    spectrum = torch.zeros(logical.numel())
    spectrum[places] = model.get_base_model()[0].fourierft_spectrum["default"].detach()
    update = torch.fft.ifft2(spectrum.view(logical.shape)).real * 150
    merged = model.merge_and_unload()[0].weight
    merged = merged.t() if isinstance(layer, nn.Embedding) else merged.flatten(1)
    torch.testing.assert_close(merged, logical + update)


def test_a_small_update_is_not_lost_in_half_precision() -> None:
    model = wrapped(nn.Linear(6, 5).bfloat16(), scaling=0.02)
    inner, x = model.get_base_model()[0], torch.randn(4, 6).bfloat16()
    inner.base_layer.weight.data.fill_(8.0)
    inner.base_layer.bias.data.zero_()
    x[:, 1::2] = -x[:, ::2]  # the large weight cancels, the update does not
    assert model(x).abs().max() > 0


def test_combining_needs_equal_places_and_minds_scalings() -> None:
    model = wrapped()
    model.add_adapter("b", FourierFTConfig(n_frequency=7, target_modules=["0"], scaling=300.0))
    model.add_adapter("c", FourierFTConfig(n_frequency=7, target_modules=["0"], random_loc_seed=1))
    layer = model.get_base_model()[0]
    model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "sum")
    expected = layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("b")
    torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
    with pytest.raises(PeftcError, match="different places"):
        model.add_weighted_adapter(["default", "c"], [1.0, 1.0], "none")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"n_frequency": 31}, "`n_frequency: 31` is beyond what"), ({"random_loc_seed": None}, "only the seed does"),
     ({"bias": "some"}, "`bias` cannot be `\"some\"`")],
)  # fmt: skip
def test_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PeftcError, match=says):
        wrapped(**options)


def test_folders_load_in_the_reference_and_back(tmp_path: Path) -> None:
    x, layer = torch.randn(3, 6), nn.Linear(6, 5)
    ours = wrapped(layer, n_frequency_pattern={"0": 9})
    expected = ours(x)
    ours.save_pretrained(tmp_path / "ours")
    clean = nn.Sequential(ours.unload()[0])
    theirs = peft.PeftModel.from_pretrained(clean, tmp_path / "ours")
    torch.testing.assert_close(theirs(x), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(nn.Sequential(layer), tmp_path / "theirs")
    torch.testing.assert_close(again(x), expected)
