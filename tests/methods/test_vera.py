"""VeRA: the formula on every kind of layer, projections of the seed, and files of the reference with and without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, PeftModel, VeraConfig, get_peft_model


def model_of(first: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(first or nn.Linear(6, 5), nn.Linear(5, 9))
    targets = {"r": 3, "target_modules": ["0", "1"], "init_weights": False}
    return get_peft_model(base, VeraConfig(**{**targets, **options}))


def draws(r: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """A, then B, of one generator, uniform with the variance `2 / fan-in`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (r, inputs), (outputs, r)
    A, B = (torch.empty(s).uniform_(-((6 / s[1]) ** 0.5), (6 / s[1]) ** 0.5, generator=generator) for s in shapes)
    return A, B


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 5, 2), nn.Conv1d(2, 5, 3), nn.Embedding(8, 5)])
def test_the_formula(layer: nn.Module) -> None:
    weight = layer.weight.detach().clone()
    model = model_of(layer, projection_prng_key=4)
    logical = weight.t() if isinstance(layer, nn.Embedding) else weight.flatten(1)
    A, B = draws(3, max(5, logical.shape[1]), 9, 4)
    adapted = model.get_base_model()[0]
    b, d = adapted.vera_lambda_b["default"].detach(), adapted.vera_lambda_d["default"].detach()
    update = b[:, None] * B[:5] @ (d[:, None] * A[:, : logical.shape[1]])
    merged = model.merge_and_unload()[0].weight
    merged = merged.t() if isinstance(layer, nn.Embedding) else merged.flatten(1)
    torch.testing.assert_close(merged, logical + update)


def test_it_starts_as_in_the_paper() -> None:
    layer = model_of(init_weights=True, d_initial=0.3).get_base_model()[0]
    assert (layer.vera_lambda_d["default"] == 0.3).all() and (layer.vera_lambda_b["default"] == 0).all()


@pytest.mark.parametrize("option", [{"projection_prng_key": 1}, {"save_projection": False}])
def test_adapters_of_a_model_have_the_same_projections(option: dict[str, Any]) -> None:
    model = model_of()
    with pytest.raises(PeftcError, match=f"PC431.*{next(iter(option))}"):
        model.add_adapter("other", VeraConfig(r=3, target_modules=["0"], **option))


def test_a_kind_of_bias_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PeftcError, match='`bias` cannot be `"some"`'):
        model_of(bias="some")


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.filterwarnings("ignore:Specified to not")
def test_folders_load_in_the_reference_and_back(saves: bool, tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    ours = model_of(save_projection=saves, projection_prng_key=9)
    expected = ours(x)
    ours.save_pretrained(tmp_path / "ours")
    base = ours.unload()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(x), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(theirs.unload(), tmp_path / "theirs")
    torch.testing.assert_close(again(x), expected)
