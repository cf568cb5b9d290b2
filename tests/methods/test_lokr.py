"""LoKr by its paper: the Kronecker product as two small products, its factors' shapes, and what is dropped of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peftc_plugins.lokr import factorization
from torch import Tensor, nn

from peftc import LoKrConfig, PeftcError, PeftModel, get_peft_model
from tests.e2e.test_interop import Case
from tests.methods.exchange import assert_exchanged, trained_alike

CASES = [
    Case("LoKrConfig", "mlp", {"r": 2, "target_modules": ["lin0", "lin1"], "alpha": 3}),
    Case("LoKrConfig", "mlp", {"r": 8, "target_modules": "lin[012]", "rank_pattern": {"lin1": 1}}),
    Case("LoKrConfig", "mlp", {"r": 1, "target_modules": ["lin0", "lin1"], "decompose_both": True}),
    Case("LoKrConfig", "mlp", {"r": 1, "target_modules": ["lin1"], "decompose_factor": 2, "init_weights": "lycoris"}),
    Case(
        "LoKrConfig", "mlp", {"r": 2, "target_modules": ["lin0"], "init_weights": False, "alpha_pattern": {"lin0": 5}}
    ),
    Case("LoKrConfig", "conv2d", {"r": 1, "target_modules": ["conv1", "grouped", "head"]}),
    Case("LoKrConfig", "conv2d", {"r": 1, "target_modules": ["conv1", "grouped"], "use_effective_conv2d": True}),
    Case("LoKrConfig", "conv2d", {"r": 8, "target_modules": ["conv1", "grouped"], "use_effective_conv2d": True}),
    Case("LoKrConfig", "conv1d", {"r": 1, "target_modules": ["conv0", "head"]}),
    Case("LoKrConfig", "conv1d", {"r": 8, "target_modules": ["conv0"]}),
    Case("LoKrConfig", "llama", {"r": 2, "modules_to_save": ["lm_head"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_are_the_references(case: Case, tmp_path: Path) -> None:
    assert_exchanged(case, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("model", ["mlp", "conv2d"])
def test_what_is_dropped_is_what_the_reference_drops(model: str, rescale: bool) -> None:
    options = {
        "r": 1,
        "target_modules": ["lin0", "lin1"] if model == "mlp" else ["conv1", "grouped"],
        "rank_dropout": 0.5,
        "module_dropout": 0.01,
        "rank_dropout_scale": rescale,
    }
    theirs, ours = trained_alike(Case("LoKrConfig", model, options))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 5, 7, 16, 200])
def test_numbers_are_factored_as_by_the_reference(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization as theirs

    numbers = [*range(1, 130), 511, 512, 768, 1376, 4096, 11008, 32000]
    assert [factorization(n, factor) for n in numbers] == [theirs(n, factor) for n in numbers]


def wrapped(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(layer or nn.Linear(24, 20)).double()
    return get_peft_model(base, LoKrConfig(**{"r": 1, "init_weights": False, "target_modules": ["0"], **options}))


def slots(model: PeftModel) -> dict[str, Tensor]:
    found = dict(model.get_base_model()[0].named_parameters())
    return {name.split(".")[0].removeprefix("lokr_"): p for name, p in found.items() if "lokr" in name}


def factors(model: PeftModel) -> tuple[Tensor, Tensor]:
    s = slots(model)
    first = s["w1"] if "w1" in s else s["w1_a"] @ s["w1_b"]
    return first, s["w2"] if "w2" in s else s["w2_a"] @ s["w2_b"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"r": 1}, {"w1", "w2_a", "w2_b"}),
        ({"r": 4}, {"w1", "w2"}),
        ({"r": 1, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
        ({"r": 2, "decompose_factor": 2}, {"w1", "w2_a", "w2_b"}),
    ],
    ids=["second factored", "both whole", "both factored", "another factor"],
)
def test_the_formula(options: dict[str, Any], names: set[str]) -> None:
    model = wrapped(alpha=6, **options)
    assert set(slots(model)) == names
    base, x = model.get_base_model()[0].base_layer, torch.randn(2, 3, 24).double()
    delta = 6 / options["r"] * torch.kron(*factors(model))
    torch.testing.assert_close(model(x), base(x) + x @ delta.T)
    torch.testing.assert_close(model.get_base_model()[0].get_delta_weight("default"), delta)


@pytest.mark.parametrize("r", [1, 4])
def test_embeddings_are_looked_up(r: int) -> None:
    model = wrapped(nn.Embedding(12, 6), r=r, alpha=2 * r)
    ids = torch.tensor([[0, 11], [3, 3]])
    delta = 2 * torch.kron(*factors(model))
    torch.testing.assert_close(model(ids), model.get_base_model()[0].base_layer(ids) + delta.T[ids])


def test_the_product_is_never_made_in_a_linear_layer() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoKrConfig(r=2, target_modules=["0"]))
    with torch.profiler.profile(record_shapes=True) as profile:
        model(torch.randn(3, 64)).sum().backward()
    base = {"aten::t", "aten::transpose", "aten::as_strided", "aten::linear", "aten::addmm", "aten::expand"}
    large = [e.key for e in profile.key_averages(group_by_input_shape=True) if [64, 64] in e.input_shapes]
    assert set(large) <= base | {"aten::mm", "aten::detach", "detach"}
    assert "aten::kron" not in {event.key for event in profile.key_averages()}


def test_kernels_of_sequences_can_be_factored() -> None:
    """The reference makes the same parameters, and fails in its first call."""
    case = Case("LoKrConfig", "conv1d", {"r": 1, "target_modules": ["conv0"], "use_effective_conv2d": True})
    theirs, ours = case.made_by("peft"), case.made_by("peftc")
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match="view size"):
        case.output(theirs)
    layer = ours.get_base_model().conv0
    assert layer.lokr_t2["default"].shape == (1, 1, 3, 1)
    second = torch.einsum("pqk,po,qi->oik", layer.lokr_t2["default"][..., 0], *(
        getattr(layer, f"lokr_w2_{side}")["default"] for side in "ab"
    ))  # fmt: skip
    delta = torch.kron(layer.lokr_w1["default"][:, :, None], second) * layer.scaling["default"]
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_dropping_every_row_drops_the_update() -> None:
    """The reference divides by their number."""
    from peft import LoKrConfig as Theirs
    from peft import get_peft_model as adapted

    options = {"r": 1, "rank_dropout": 0.999, "rank_dropout_scale": True, "target_modules": ["0"]}
    assert adapted(nn.Sequential(nn.Linear(4, 1)), Theirs(**options)).train()(torch.randn(3, 4)).isnan().all()
    model = wrapped(nn.Linear(4, 1), **options).train()
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(model(x), model.get_base_model()[0].base_layer(x))


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(PeftcError, match="decompose_factor"):
        wrapped(decompose_factor=-2)
    with pytest.raises(PeftcError, match="PC102"):
        wrapped(module_dropout=2.0)
    model = wrapped()
    model.add_adapter("other", LoKrConfig(r=1, target_modules=["0"]))
    with pytest.raises(PeftcError, match="says no way to combine"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
