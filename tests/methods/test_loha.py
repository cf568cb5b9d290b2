"""LoHa by its paper: the entrywise product, by thin factors or folded, and what is dropped of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import LoHaConfig, PeftcError, PeftcWarning, PeftModel, get_peft_model
from tests.e2e.test_interop import Case
from tests.methods.exchange import assert_exchanged, largest_kept, trained_alike

CASES = [
    Case("LoHaConfig", "mlp", {"r": 2, "target_modules": ["lin0", "lin1"], "alpha": 3}),
    Case("LoHaConfig", "mlp", {"r": 8, "target_modules": "lin[012]", "rank_pattern": {"lin1": 1}}),
    Case(
        "LoHaConfig", "mlp", {"r": 3, "target_modules": ["lin0"], "init_weights": False, "alpha_pattern": {"lin0": 5}}
    ),
    Case("LoHaConfig", "conv2d", {"r": 2, "target_modules": ["conv1", "grouped", "head"]}),
    Case("LoHaConfig", "conv2d", {"r": 2, "target_modules": ["conv1", "grouped"], "use_effective_conv2d": True}),
    Case("LoHaConfig", "conv1d", {"r": 1, "target_modules": ["conv0"], "use_effective_conv2d": True}),
    Case("LoHaConfig", "conv1d", {"r": 2, "target_modules": ["conv0", "head"]}),
    Case("LoHaConfig", "llama", {"r": 2, "modules_to_save": ["lm_head"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_are_the_references(case: Case, tmp_path: Path) -> None:
    assert_exchanged(case, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("r", [1, 6], ids=["thin", "folded"])
def test_what_is_dropped_is_what_the_reference_drops(r: int) -> None:
    options = {"r": r, "target_modules": ["lin0", "lin1"], "rank_dropout": 0.5, "module_dropout": 0.01}
    theirs, ours = trained_alike(Case("LoHaConfig", "mlp", options))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def wrapped(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(layer or nn.Linear(24, 20)).double()
    return get_peft_model(base, LoHaConfig(**{"r": 2, "init_weights": False, "target_modules": ["0"], **options}))


def slots(model: PeftModel) -> dict[str, Tensor]:
    layer = model.get_base_model()[0]
    return {name: getattr(layer, f"hada_{name}")["default"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}


@pytest.mark.parametrize("r", [1, 2, 5, 8])
def test_the_formula(r: int) -> None:
    """Up to rank 1 of this layer thin products are used, beyond it the weight is folded."""
    model = wrapped(r=r, alpha=6)
    s, base, x = slots(model), model.get_base_model()[0].base_layer, torch.randn(3, 24).double()
    delta = 6 / r * (s["w1_a"] @ s["w1_b"]) * (s["w2_a"] @ s["w2_b"])
    torch.testing.assert_close(model(x), base(x) + x @ delta.T)
    torch.testing.assert_close(model.get_base_model()[0].get_delta_weight("default"), delta)


def test_embeddings_are_looked_up() -> None:
    model = wrapped(nn.Embedding(9, 6))
    s, ids = slots(model), torch.tensor([[0, 8], [3, 3]])
    delta = 4 * (s["w1_a"] @ s["w1_b"]) * (s["w2_a"] @ s["w2_b"])
    torch.testing.assert_close(model(ids), model.get_base_model()[0].base_layer(ids) + delta.T[ids])


def test_effective_convolutions_take_three_dimensions_too() -> None:
    model = wrapped(nn.Conv3d(2, 4, (1, 2, 3), groups=2, bias=False), use_effective_conv2d=True)
    layer, s = model.get_base_model()[0], slots(model)
    assert layer.hada_t1["default"].shape == (2, 2, 1, 2, 3)
    parts = [
        torch.einsum("pqxyz,po,qi->oixyz", getattr(layer, f"hada_t{n}")["default"], a, b)
        for n, a, b in ((1, s["w1_a"], s["w1_b"]), (2, s["w2_a"], s["w2_b"]))
    ]
    x = torch.randn(2, 2, 3, 4, 5).double()
    expected = nn.functional.conv3d(x, layer.base_layer.weight + 4 * parts[0] * parts[1], groups=2)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("r", [2, 12], ids=["thin", "folded"])
def test_no_matrix_of_the_weights_size_is_kept_for_backward(r: int) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(60, 50)), LoHaConfig(r=r, target_modules=["0"]))
    assert largest_kept(model, torch.randn(3, 60)) < 50 * 60


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_factored_kernels_are_the_slopes() -> None:
    """The reference takes the core of one factor for that of the other."""
    case = Case("LoHaConfig", "conv2d", {"r": 2, "target_modules": ["conv1", "strided"], "use_effective_conv2d": True})
    theirs, ours = case.made_by("peft").double(), case.made_by("peftc").double()
    ours.load_state_dict(theirs.state_dict())
    name = "base_model.model.strided.hada_w1_a.default"
    slopes = []
    for model in (theirs, ours):
        slot, x = dict(model.named_parameters())[name], case.tiny.arguments(torch.float64)
        model(**x).sum().backward()
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                slot[0, 0] += step
                values.append(float(model(**x).sum()))
        slopes.append((float(slot.grad[0, 0]), (values[0] - values[1]) / 2e-5))
    assert slopes[0][0] != pytest.approx(slopes[0][1], rel=1e-2)
    assert slopes[1][0] == pytest.approx(slopes[1][1], rel=1e-5)


def test_a_convolution_keeps_its_padding() -> None:
    model = wrapped(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), r=1)
    s, x = slots(model), torch.randn(2, 4, 5, 5).double()
    base = model.get_base_model()[0].base_layer
    delta = 8 * ((s["w1_a"] @ s["w1_b"]) * (s["w2_a"] @ s["w2_b"])).view_as(base.weight)
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(model(x), base(x) + nn.functional.conv2d(padded, delta))


def test_dropping_every_row_drops_the_update() -> None:
    model = wrapped(nn.Linear(4, 1), r=1, rank_dropout=0.999).train()
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(model(x), model.get_base_model()[0].base_layer(x))


def test_what_has_no_meaning_is_told() -> None:
    with pytest.warns(PeftcWarning, match="PC402"):
        wrapped(r=21)
    with pytest.raises(PeftcError, match="PC102"):
        wrapped(rank_dropout=1.0)
    model = wrapped()
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["0"]))
    with pytest.raises(PeftcError, match="says no way to combine"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
