"""BOFT by its paper and beside the reference: butterfly factors, the scale that spares the bias, dropped blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peftc import BOFTConfig, PeftcError, PeftcWarning, PeftModel, get_peft_model
from tests.methods.exchange import assert_read_by_both, losses_of


def wrapped(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    """A layer of 16 features with an adapter that rotates and scales at random."""
    torch.manual_seed(0)
    base = nn.Sequential(layer or nn.Linear(16, 5)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftcWarning)
        model = get_peft_model(base, BOFTConfig(**{"target_modules": ["0"], **options})).eval()
    nn.init.normal_(entries(model), std=0.5)
    nn.init.normal_(scale(model), mean=1, std=0.3)
    return model


def entries(model: PeftModel) -> nn.Parameter:
    return model.get_base_model()[0].boft_R["default"]


def scale(model: PeftModel) -> nn.Parameter:
    return model.get_base_model()[0].boft_s["default"]


def rotation(entries: Tensor) -> Tensor:
    """The product of the factors `(m, blocks, b, b)`, each with its permutation as a matrix, as the paper writes it."""
    _, blocks, size, _ = entries.shape
    features = blocks * size
    product = torch.eye(features, dtype=entries.dtype)
    for level, factor in enumerate(entries.detach()):
        diagonal = torch.block_diag(*[transformed(block) for block in factor])
        run = size * 2**level
        halves = torch.arange(features).view(-1, run // (size // 2), size // 2)
        order = torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).flatten()
        P = torch.eye(features, dtype=entries.dtype)[order]
        product = P @ diagonal @ P.T @ product
    return product


def transformed(block: Tensor) -> Tensor:
    Q, eye = (block - block.T) / 2, torch.eye(len(block), dtype=block.dtype)
    return (eye - Q) @ torch.linalg.inv(eye + Q)


FACTORS = [(4, 1), (4, 2), (4, 3), (2, 3), (2, 4), (8, 2), (16, 1)]


@pytest.mark.parametrize(("size", "factors"), FACTORS)
def test_the_formula(size: int, factors: int) -> None:
    model = wrapped(boft_block_size=size, boft_n_butterfly_factor=factors)
    assert entries(model).shape == (factors, 16 // size, size, size)
    base, x = model.get_base_model()[0].base_layer, torch.randn(3, 16).double()
    weight = scale(model) * (base.weight @ rotation(entries(model)).T)
    expected = x @ weight.T + base.bias
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_the_last_factor_reaches_every_feature() -> None:
    assert (rotation(entries(wrapped(boft_block_size=2, boft_n_butterfly_factor=4))) != 0).all()
    assert not (rotation(entries(wrapped(boft_block_size=2, boft_n_butterfly_factor=3))) != 0).all()


def test_patches_of_a_convolution_are_rotated() -> None:
    model, x = wrapped(nn.Conv2d(4, 5, 2, padding=1), boft_n_butterfly_factor=2), torch.randn(2, 4, 5, 5).double()
    assert scale(model).shape == (1, 5)
    base = model.get_base_model()[0].base_layer
    weight = (scale(model).T * (base.weight.flatten(1) @ rotation(entries(model)).T)).view_as(base.weight)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, weight, base.bias, padding=1))


def test_two_adapters_act_in_one_order_merged_or_not() -> None:
    model, x = wrapped(), torch.randn(3, 16).double()
    model.add_adapter("other", BOFTConfig(boft_block_size=8, target_modules=["0"]))
    nn.init.normal_(model.get_base_model()[0].boft_R["other"], std=0.5)
    model.base_model.set_adapter(["default", "other"])
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    ("layer", "options", "code"),
    [
        (nn.Linear(15, 5), {}, "PC401"),
        (nn.Linear(16, 5), {"boft_block_size": 32}, "PC401"),
        (nn.Linear(16, 5), {"boft_block_size": 0, "boft_block_num": 3}, "PC401"),
        (nn.Linear(15, 5), {"boft_block_size": 5, "boft_n_butterfly_factor": 2}, "PC401"),
        (nn.Linear(12, 5), {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, "PC401"),
        (nn.Linear(16, 5), {"boft_block_size": 4, "boft_n_butterfly_factor": 4}, "PC401"),
        (nn.Linear(16, 5), {"boft_block_num": 4}, "PC118"),
        (nn.Linear(16, 5), {"boft_block_size": 0}, "PC118"),
        (nn.Linear(16, 5), {"bias": "some"}, "PC102"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(layer: nn.Module, options: dict[str, Any], code: str) -> None:
    with pytest.raises(PeftcError, match=code):
        get_peft_model(nn.Sequential(layer), BOFTConfig(target_modules=["0"], **options))


def test_a_start_that_rotates_is_told() -> None:
    with pytest.warns(PeftcWarning, match="PC104"):
        get_peft_model(nn.Sequential(nn.Linear(16, 5)), BOFTConfig(target_modules=["0"], init_weights=False))


def test_biases_of_adapted_layers_train_along() -> None:
    trained = {name for name, p in wrapped(bias="boft_only").named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.0.{name}" for name in ("base_layer.bias", "boft_R.default", "boft_s.default")}


def test_blocks_of_one_factor_are_left_out_in_training_only() -> None:
    model, x = wrapped(boft_block_size=8, boft_n_butterfly_factor=2, boft_dropout=0.5), torch.randn(3, 16).double()
    base, whole = model.get_base_model()[0].base_layer, entries(model).detach()

    def output(entries: Tensor) -> Tensor:
        return x @ (scale(model) * (base.weight @ rotation(entries).T)).T + base.bias

    possible = [whole]
    for factor in range(2):
        for left_out in ([0], [1], [0, 1]):
            possible.append(whole.clone())
            possible[-1][factor, left_out] = 0
    expected = output(whole)
    torch.testing.assert_close(model(x), expected)
    model.train()
    torch.manual_seed(0)
    found = [[torch.allclose(y, output(entries)) for entries in possible] for y in (model(x) for _ in range(60))]
    assert all(sum(fits) == 1 for fits in found)
    assert {fits.index(True) for fits in found} == set(range(7))
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


# the reference --------------------------------------------------------------------------------------------------------


class Kernel:
    """What the reference's CUDA extension computes, which it needs for more than one factor."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize(
    "options",
    [{}, {"boft_block_size": 0, "boft_block_num": 2}, {"boft_n_butterfly_factor": 2},
     {"boft_block_size": 2, "boft_n_butterfly_factor": 4}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 5), lambda: nn.Conv2d(4, 5, 2)], ids=["linear", "conv"])
@pytest.mark.filterwarnings("ignore")
def test_folders_go_both_ways(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.get("boft_n_butterfly_factor", 1) > 1:
        monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", Kernel())
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(3, 16) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    assert_read_by_both("BOFTConfig", layer, make, x, {"init_weights": False, **options}, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_file_with_fewer_factors_than_its_options_say_is_read_as_it_is(tmp_path: Path) -> None:
    """Where the reference lacks its CUDA extension it trains one factor, whatever the options say."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 5), torch.randn(3, 16)
    bases = [nn.Sequential(nn.Linear(16, 5)) for _ in range(2)]
    for base in bases:
        base[0].load_state_dict(layer.state_dict())
    config = peft.BOFTConfig(target_modules=["0"], boft_n_butterfly_factor=2, init_weights=False)
    theirs = peft.get_peft_model(bases[0], config).eval()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(bases[1], tmp_path).eval()
    assert entries(ours).shape == (1, 4, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore")
def test_training_goes_as_in_the_reference() -> None:
    torch.manual_seed(0)
    x, losses = torch.randn(3, 16), []
    bases = [nn.Sequential(nn.Linear(16, 5)) for _ in range(2)]
    bases[1].load_state_dict(bases[0].state_dict())
    made = (get_peft_model(bases[0], BOFTConfig(target_modules=["0"])),
            peft.get_peft_model(bases[1], peft.BOFTConfig(target_modules=["0"])))  # fmt: skip
    for model in made:
        losses.append(losses_of(model, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
