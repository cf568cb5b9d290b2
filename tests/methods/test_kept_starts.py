"""Adapters whose starts changed the base weights, saved, loaded and turned to the original base: here and in the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftc
from peftc import AdaLoraConfig, LoraConfig, PeftcError, PeftcWarning, PeftModel, rules
from peftc.model.parts import starts
from tests.defects import put_defect

KEPT = "peftc_start.safetensors"
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
STARTS = ("pissa", "pissa_niter_3", "olora")


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))


def options(start: Any = "pissa", **more: Any) -> dict[str, Any]:
    return {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": start, "lora_alpha": 6, **more}


def trained(model: Any) -> Any:
    """The model with other factors."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def made(start: Any = "pissa", **more: Any) -> PeftModel:
    return trained(peftc.get_peft_model(base(), LoraConfig(**options(start, **more))))


def output(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("start", STARTS)
def test_saved_and_loaded_it_is_the_same_bit_for_bit(tmp_path: Path, start: str) -> None:
    model = made(start)
    model.save_pretrained(tmp_path)
    assert (tmp_path / KEPT).is_file()
    plain = base()
    state = torch.get_rng_state()
    again = PeftModel.from_pretrained(plain, tmp_path)  # nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(again), output(model))
    with again.disable_adapter():
        assert torch.equal(output(again), output(base()))


def test_another_method_is_too(tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["0", "2"], init_lora_weights="pissa_niter_2"
    )
    model = trained(peftc.get_peft_model(base(), config))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(base(), tmp_path)), output(model))
    model.save_pretrained(tmp_path / "turned", path_initial_model_for_weight_conversion=True)
    torch.testing.assert_close(output(PeftModel.from_pretrained(base(), tmp_path / "turned")), output(model))


@pytest.mark.parametrize("start", ("pissa", "olora"))
def test_the_reference_repeats_the_decomposition_of_our_folders_and_we_of_its(tmp_path: Path, start: str) -> None:
    model = made(start)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(output(theirs), output(model), rtol=1e-5, atol=1e-6)
    other = trained(peft.get_peft_model(base(), peft.LoraConfig(**options(start))))
    other.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(output(again), output(other), rtol=1e-5, atol=1e-6)


def test_a_start_by_chance_is_repeated_with_a_warning(tmp_path: Path) -> None:
    trained(peft.get_peft_model(base(), peft.LoraConfig(**options("pissa_niter_2")))).save_pretrained(tmp_path)
    with pytest.warns(PeftcWarning, match=rules.START_NOT_REPEATED.code):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 3}},
                                  {"use_rslora": True, "rank_pattern": {"2": 2}, "alpha_pattern": {"0": 3}}], ids=str)  # fmt: skip
@pytest.mark.parametrize("start", STARTS)
def test_turned_it_is_a_plain_adapter_of_twice_the_rank(tmp_path: Path, start: str, more: dict[str, Any]) -> None:
    model = made(start, **more)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=True)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["init_lora_weights"] is True
    assert told["r"] == 8
    assert not (tmp_path / KEPT).exists()
    for library in (peftc, peft):
        again = library.PeftModel.from_pretrained(base(), tmp_path)
        torch.testing.assert_close(output(again), output(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stable", [False, True])
def test_by_the_folder_of_its_beginning_it_is_what_the_reference_makes(tmp_path: Path, stable: bool) -> None:
    results = {}
    for library in (peftc, peft):
        folder = tmp_path / library.__name__
        model = library.get_peft_model(base(), library.LoraConfig(**options("pissa", use_rslora=stable)))
        model.peft_config["default"].init_lora_weights = True  # as its documentation says
        model.save_pretrained(folder / "first")
        model.peft_config["default"].init_lora_weights = "pissa"
        trained(model).save_pretrained(folder / "new", path_initial_model_for_weight_conversion=str(folder / "first"))
        config = json.loads((folder / "new" / "adapter_config.json").read_text())
        results[library] = load_file(folder / "new" / "adapter_model.safetensors"), config
    (ours, config), (theirs, other) = results[peftc], results[peft]
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor)
    assert (config["r"], config["init_lora_weights"]) == (other["r"], other["init_lora_weights"]) == (8, True)
    assert config["lora_alpha"] == pytest.approx(other["lora_alpha"])


def test_a_beginning_of_another_adapter_is_refused(tmp_path: Path) -> None:
    model = made()
    made(True, r=2).save_pretrained(tmp_path / "other")
    with pytest.raises(PeftcError, match=rules.OTHER_WEIGHTS.code):
        model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path / "other"))
    assert not (tmp_path / "new").exists()


def test_a_turned_adapter_stands_beside_others(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=True)
    model.load_adapter(tmp_path, "turned")
    expected = output(model)
    model.set_adapter("turned")
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_loaded_over_itself_it_has_the_weights_of_the_file(tmp_path: Path) -> None:
    """As a trainer loads its best checkpoint."""
    torch.manual_seed(5)
    first = made("pissa_niter_1")
    first.save_pretrained(tmp_path)
    torch.manual_seed(6)
    model = made("pissa_niter_1")
    model.load_adapter(tmp_path, "default")
    assert torch.equal(output(model), output(first))
    with model.disable_adapter():
        assert torch.equal(output(model), output(base()))


def test_a_kept_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    kept = load_file(tmp_path / KEPT)
    for broken in ({k: v for k, v in kept.items() if k != "0:A"}, {**kept, "2:B": torch.zeros(3, 4)}):
        save_file(broken, tmp_path / KEPT)
        with pytest.raises(PeftcError, match=rules.START_KEPT_UNFIT.code):
            PeftModel.from_pretrained(base(), tmp_path)


def test_converted_it_is_beside_the_original_base(tmp_path: Path) -> None:
    model = made()
    peftc.save_as_lora(tmp_path, model, rank=8)
    torch.testing.assert_close(output(PeftModel.from_pretrained(base(), tmp_path)), output(model), rtol=1e-4, atol=1e-5)


def test_what_needs_the_original_base_is_refused(tmp_path: Path) -> None:
    model = made()
    model.add_adapter("n", LoraConfig(**options(True)))
    with pytest.raises(PeftcError, match=rules.CANNOT_COMBINE.code):
        model.add_weighted_adapter(["default", "n"], [1.0, 1.0], "sum", "linear")
    with pytest.raises(PeftcError, match=rules.CALL_NOT_POSSIBLE.code):
        model(X, adapter_names=["n"] * 4 + ["default"])
    model.save_pretrained(tmp_path)
    with pytest.raises(PeftcError, match=rules.CANNOT_SWAP.code):
        peftc.hotswap_adapter(model, tmp_path, "n")
    model.set_adapter("n")
    torch.testing.assert_close(model(X, adapter_names=["n"] * 4 + ["__base__"])[4:], base()(X[4:]))


def test_the_print_of_the_base_is_the_originals(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    peftc.get_peft_model(base(), LoraConfig(**options(True))).save_pretrained(tmp_path / "plain")
    assert (tmp_path / "peftc_base.json").read_text() == (tmp_path / "plain" / "peftc_base.json").read_text()


def test_the_base_models_own_state_is_the_originals() -> None:
    model = made()
    own = peftc.get_base_model_state_dict(model)
    for name, tensor in base().state_dict().items():
        assert torch.equal(own[name], tensor)
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))
    peftc.set_base_model_state_dict(model, other.state_dict())
    with model.disable_adapter():
        assert torch.equal(output(model), output(other))
    kept = model.get_base_model()[0].rebased.held["default"].kept
    weight = other[0].weight - 6 / 4 * kept["B"] @ kept["A"]
    torch.testing.assert_close(model.get_base_model()[0].get_base_layer().weight, weight)


def test_the_tests_of_what_is_kept_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rules.START_KEPT_UNFIT and rules.START_NOT_REPEATED."""
    with monkeypatch.context() as patch:
        put_defect(patch, starts, "    problems.raise_errors()\n", "")
        with pytest.raises((pytest.fail.Exception, KeyError, RuntimeError)):
            test_a_kept_start_that_does_not_fit_is_refused(tmp_path)
    with monkeypatch.context() as patch:
        put_defect(patch, starts, "    if chosen.start.repeats(chosen.argument):", "    if True:")
        with pytest.raises(pytest.fail.Exception):
            test_a_start_by_chance_is_repeated_with_a_warning(tmp_path / "again")
