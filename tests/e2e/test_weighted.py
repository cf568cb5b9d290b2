"""`add_weighted_adapter` gives what the reference's gives, in every way of combining, and does right where that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftc import PeftcError
from peftc.testing.models import seeded
from tests.e2e.pairs import Pair, pair

KINDS = ("svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
PRUNED = {"magnitude_prune", "magnitude_prune_svd", *(kind for kind in KINDS if "ties" in kind or "dare" in kind)}
WEIGHTS = {"default": 0.7, "second": -0.4, "third": 1.2}

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"target_modules": ["lin0", "lin1"]},
    "conv2d": {"target_modules": ["conv1", "conv0", "head"]},
    "embedding": {"target_modules": ["emb", "lin0"]},
    "gpt2": {"fan_in_fan_out": True},
}

pytestmark = pytest.mark.filterwarnings("ignore")


def three(model: str, **options: Any) -> Pair:
    both = pair(model, "LoraConfig", r=3, lora_alpha=5, **MODELS[model], **options)
    both.add("second", "LoraConfig", 2, r=3, lora_alpha=2, **MODELS[model], **options)
    both.add("third", "LoraConfig", 3, r=3, lora_alpha=7, use_rslora=True, **MODELS[model], **options)
    return both


def combine(both: Pair, kind: str, **options: Any) -> None:
    if kind in PRUNED:
        options["density"] = 0.6
    for model in (both.theirs, both.ours):
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "mixed", kind, **options)
        model.set_adapter("mixed")


@pytest.fixture
def equal_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """DARE's random numbers by shape: the reference draws others before it comes to them."""

    def drawn(probability: Tensor) -> Tensor:
        with seeded(probability.numel()):
            return (torch.rand(probability.shape) < probability).to(probability.dtype)

    monkeypatch.setattr(torch, "bernoulli", drawn)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", [*KINDS, "magnitude_prune", "magnitude_prune_svd"])
def test_every_way_gives_what_the_reference_gives(kind: str, model: str, equal_draws: None) -> None:
    both = three(model)
    combine(both, kind)
    both.assert_same_updates("mixed")
    if model != "conv2d":  # the reference's convolutions forget their geometry
        both.assert_alike()
    theirs, ours = both.theirs.peft_config["mixed"], both.ours.peft_config["mixed"]
    assert (ours.r, ours.lora_alpha, ours.target_modules) == (theirs.r, theirs.lora_alpha, theirs.target_modules)


@pytest.mark.parametrize("options", [{"svd_rank": 2}, {"svd_clamp": 0.9}, {"svd_full_matrices": False}], ids=str)
def test_options_of_the_decomposition_count(options: dict[str, Any]) -> None:
    both = three("mlp")
    combine(both, "svd", **options)
    both.assert_alike()


def test_signs_may_be_elected_by_frequency() -> None:
    both = three("mlp")
    combine(both, "ties", majority_sign_method="frequency")
    both.assert_alike()


def test_one_adapter_alone_is_scaled() -> None:
    both = three("mlp")
    for model in (both.theirs, both.ours):
        model.add_weighted_adapter(["second"], [2.0], "twice")
        model.set_adapter("twice")
    both.assert_alike()


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_adapters_of_other_modules_and_ranks(kind: str) -> None:
    both = pair("mlp", "LoraConfig", r=2, target_modules=["lin0", "lin1"], rank_pattern={"lin1": 4})
    both.add("second", "LoraConfig", 2, r=3, target_modules=["lin1", "lin2"], alpha_pattern={"lin2": 9})
    both.add("third", "LoraConfig", 3, r=1, target_modules=["lin2"])
    combine(both, kind)
    both.assert_alike()


def test_cat_is_the_sum_of_the_updates() -> None:
    both = three("mlp")
    layer = both.ours.base_model.model.lin0
    wanted = sum(weight * layer.get_delta_weight(name) for name, weight in WEIGHTS.items())
    combine(both, "cat")
    torch.testing.assert_close(layer.get_delta_weight("mixed"), wanted)


def test_a_combined_adapter_survives_saving(tmp_path: Any) -> None:
    import peftc

    both = three("mlp")
    combine(both, "cat")
    both.ours.save_pretrained(tmp_path, selected_adapters=["mixed"])
    loaded = peftc.PeftModel.from_pretrained(both.tiny.build(), tmp_path / "mixed").eval()
    torch.testing.assert_close(both.output(loaded), both.output(both.ours), rtol=0, atol=0)


def test_scales_are_summed() -> None:
    options = {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}
    both = pair("mlp", "IA3Config", **options)
    both.add("second", "IA3Config", 2, **options)
    for model in (both.theirs, both.ours):
        model.add_weighted_adapter(["default", "second"], [0.3, 0.9], "mixed")
        model.set_adapter("mixed")
    both.assert_alike()


def test_what_the_reference_refuses_is_refused() -> None:
    both = pair("mlp", "LoraConfig", r=2, target_modules=["lin0"], modules_to_save=["lin2"])
    both.add("second", "LoraConfig", 2, r=3, target_modules=["lin0"])
    for adapters, kind in (
        (["default", "second"], "linear"),
        (["default", "nobody"], "cat"),
        (["default", "second"], "sdv"),
    ):
        for model, error in ((both.theirs, ValueError), (both.ours, PeftcError)):
            before = list(model.peft_config)
            with pytest.raises(error):
                model.add_weighted_adapter(adapters, [1.0] * len(adapters), "mixed", kind)
            if model is both.ours:
                assert list(model.peft_config) == before
