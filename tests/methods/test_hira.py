"""HiRA by its paper: the pristine weight times a low-rank matrix, alone, several at once, and beside merged adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import HiraConfig, PeftcWarning, PeftModel, get_peft_model
from tests.e2e.pairs import TINY
from tests.e2e.test_interop import Case
from tests.methods.exchange import assert_exchanged, largest_kept, trained_alike

CASES = [
    Case("HiraConfig", "mlp", {"r": 4, "target_modules": ["lin0", "lin1"], "modules_to_save": ["lin2"]}),
    Case("HiraConfig", "mlp", {"r": 2, "target_modules": "lin[012]", "init_weights": False, "hira_dropout": 0.1}),
    Case("HiraConfig", "mlp", {"r": 2, "target_modules": "lin[012]", "init_weights": "gaussian"}),
    Case("HiraConfig", "conv2d", {"r": 2, "target_modules": ["conv1", "head"]}),
    Case("HiraConfig", "conv1d", {"r": 2, "target_modules": ["conv0"]}),
    Case("HiraConfig", "conv3d", {"r": 2, "target_modules": ["conv0", "head"]}),
    Case("HiraConfig", "embedding", {"r": 2, "target_modules": ["emb", "lin0"]}),
    Case("HiraConfig", "llama", {"r": 4}),
    Case("HiraConfig", "gpt2", {"r": 4, "fan_in_fan_out": True}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_are_the_references(case: Case, tmp_path: Path) -> None:
    assert_exchanged(case, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "target"), [("mlp", "lin0"), ("conv2d", "conv1")])
def test_inputs_are_dropped_as_by_the_reference(model: str, target: str) -> None:
    options = {"r": 2, "target_modules": [target], "hira_dropout": 0.5}
    theirs, ours = trained_alike(Case("HiraConfig", model, options))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def wrapped(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(layer or nn.Linear(24, 20)).double()
    return get_peft_model(base, config(**options))


def config(**options: Any) -> HiraConfig:
    return HiraConfig(**{"r": 3, "init_weights": False, "target_modules": ["0"], **options})


def product(model: PeftModel, adapter: str = "default") -> Tensor:
    layer = model.get_base_model()[0]
    return layer.hira_B[adapter].flatten(1) @ layer.hira_A[adapter].flatten(1)


def test_several_multiply_the_pristine_weight() -> None:
    """Their sum, whatever of them is merged, in whatever order."""
    model = wrapped()
    model.add_adapter("other", config())
    model.set_adapter(["default", "other"])
    base, x = model.get_base_model()[0].base_layer, torch.randn(3, 24).double()
    weight = base.weight * (1 + product(model) + product(model, "other"))
    expected = nn.functional.linear(x, weight, base.bias)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(["other"])
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), expected)


def test_grouped_convolutions_have_factors_of_a_groups_width() -> None:
    model = wrapped(nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"))
    base, x = model.get_base_model()[0].base_layer, torch.randn(2, 4, 5, 5).double()
    assert model.get_base_model()[0].hira_A["default"].shape == (3, 2, 3, 3)
    weight = base.weight * (1 + product(model).view_as(base.weight))
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(model(x), nn.functional.conv2d(padded, weight, base.bias, groups=2))


def test_embeddings_are_looked_up_in_the_pristine_table() -> None:
    model = wrapped(nn.Embedding(9, 6))
    model.add_adapter("other", config())
    model.set_adapter(["default", "other"])
    layer, ids = model.get_base_model()[0], torch.tensor([[0, 8], [3, 3]])
    factors = [layer.hira_embedding_B[n] @ layer.hira_embedding_A[n] for n in ("default", "other")]
    expected = (layer.base_layer.weight * (1 + sum(factors)).T)[ids]
    torch.testing.assert_close(model(ids), expected)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(ids), expected)


def test_the_folded_weight_is_not_kept_for_backward() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(60, 50)), config())
    assert largest_kept(model, torch.randn(3, 60)) < 50 * 60


def test_it_is_no_update_that_thin_factors_could_replace() -> None:
    assert not wrapped().get_base_model()[0].supports_lora_conversion()


def test_a_rank_beyond_the_layer_is_told() -> None:
    with pytest.warns(PeftcWarning, match="PC402"):
        wrapped(r=21)


@pytest.mark.filterwarnings("ignore")
def test_ranks_of_patterns_are_in_force() -> None:
    """In the reference the first adapter of a layer has the general one."""
    options = {"r": 4, "target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}
    case = Case("HiraConfig", "mlp", options)
    shapes = [case.made_by(library).get_base_model().lin1.hira_A["default"].shape for library in ("peft", "peftc")]
    assert shapes == [(4, 20), (2, 20)]


@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
@pytest.mark.parametrize(
    ("model", "targets"), [("mlp", ["lin0", "lin1"]), ("conv2d", ["conv1", "head"]), ("embedding", ["emb", "lin0"])]
)
def test_a_weighted_sum_is_exact_whatever_the_ranks(kind: str, model: str, targets: list[str], tmp_path: Path) -> None:
    tiny = TINY[model]
    adapted = get_peft_model(tiny.build(), config(target_modules=targets, r=2))
    adapted.add_adapter("second", config(target_modules=targets[:1], r=4))
    adapted.add_adapter("third", config(target_modules=targets, r=3, rank_pattern={targets[1]: 1}))
    weights = {"default": 0.7, "second": -0.4, "third": 1.2}
    adapted.add_weighted_adapter(list(weights), list(weights.values()), "sum", kind)
    assert adapted.peft_config["sum"].r == 9
    for path in targets:
        layer = adapted.get_base_model().get_submodule(path)
        wanted = sum(weights[name] * layer.get_delta_weight(name) for name in weights if name in layer.adapters)
        torch.testing.assert_close(layer.get_delta_weight("sum"), wanted)
    adapted.set_adapter("sum")
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "sum").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**tiny.arguments()), adapted.eval()(**tiny.arguments()))


def test_one_is_subtracted_from_another() -> None:
    model = wrapped()
    model.add_adapter("other", config(r=5))
    model.add_weighted_adapter(["default", "other"], [1.0, -1.0], "difference")
    layer = model.get_base_model()[0]
    wanted = layer.get_delta_weight("default") - layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("difference"), wanted)
