"""Hot-swapping gives the outputs that the reference's gives, into the same parameters, and what is saved then is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import pytest
import torch
from torch import nn

import peftc
from peftc import PeftcError, PeftcWarning
from tests.e2e.pairs import TINY, Pair, assert_equal, pair

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"mlp": ["lin0", "lin1"], "conv2d": ["conv1", "head"], "llama": ["q_proj", "down_proj"]}


def saved(tmp_path: Path, model: str, seed: int = 7, config: str = "LoraConfig", **options: Any) -> Pair:
    """Another adapter, as the reference saves it."""
    other = pair(model, config, seed=seed, **{"target_modules": TARGETS[model], **options})
    other.theirs.save_pretrained(str(tmp_path))
    return other


def swapped(both: Pair, tmp_path: Path) -> None:
    peft.utils.hotswap.hotswap_adapter(both.theirs, str(tmp_path), "default", torch_device="cpu")
    peftc.hotswap_adapter(both.ours, tmp_path, "default")


@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("rank", [3, 2, 5], ids=["same", "smaller", "larger"])
def test_the_other_adapter_acts(model: str, rank: int, tmp_path: Path) -> None:
    both = pair(model, "LoraConfig", target_modules=TARGETS[model], r=3, lora_alpha=4)
    other = saved(tmp_path, model, r=rank, lora_alpha=9)
    parameters = dict(both.ours.named_parameters())
    swapped(both, tmp_path)
    both.assert_alike()
    torch.testing.assert_close(both.output(both.ours), other.output(other.ours))
    assert all(p is parameters[name] for name, p in both.ours.named_parameters())
    assert_equal(peftc.get_peft_model_state_dict(both.ours), peftc.get_peft_model_state_dict(other.ours))


def test_modules_left_out_get_a_zero_update(tmp_path: Path) -> None:
    both = pair("mlp", "LoraConfig", target_modules=["lin0", "lin1"], r=3)
    other = saved(tmp_path, "mlp", target_modules=["lin1"], r=2, lora_alpha=9)
    swapped(both, tmp_path)
    both.assert_alike()
    torch.testing.assert_close(both.output(both.ours), other.output(other.ours))
    both.ours.save_pretrained(tmp_path / "again")
    loaded = peftc.PeftModel.from_pretrained(both.tiny.build(), tmp_path / "again").eval()
    torch.testing.assert_close(both.output(loaded), both.output(both.ours), rtol=0, atol=0)


def test_what_is_saved_after_a_swap_is_the_new_adapter(tmp_path: Path) -> None:
    """The reference saves the old adapter's config, and so another scaling, with the new tensors."""
    both = pair("mlp", "LoraConfig", target_modules=TARGETS["mlp"], r=3, lora_alpha=4)
    saved(tmp_path, "mlp", r=2, lora_alpha=9)
    peftc.prepare_model_for_compiled_hotswap(both.ours, target_rank=6)
    peftc.hotswap_adapter(both.ours, tmp_path, "default")
    assert both.ours.peft_config["default"].lora_alpha == 9
    both.ours.save_pretrained(tmp_path / "again")
    for library in (peft, peftc):
        loaded = library.PeftModel.from_pretrained(both.tiny.build(), str(tmp_path / "again")).eval()
        torch.testing.assert_close(both.output(loaded), both.output(both.ours))


@pytest.mark.parametrize("model", ["mlp", "conv2d"])
def test_padding_changes_no_number(model: str) -> None:
    both = pair(model, "LoraConfig", target_modules=TARGETS[model], r=3, lora_alpha=4)
    before = both.output(both.ours)
    for library in (peft.utils.hotswap, peftc):
        library.prepare_model_for_compiled_hotswap(both.theirs if library is not peftc else both.ours, target_rank=6)
    torch.testing.assert_close(both.output(both.ours), before)
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (both.theirs, both.ours)]
    assert shapes[0] == shapes[1]
    x = {name: tensor.requires_grad_() for name, tensor in both.tiny.arguments().items()}
    both.ours(**x).sum().backward()  # it can be trained on
    assert all(p.grad is not None for p in both.ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_compiled_model_is_not_compiled_again(grad: bool, tmp_path: Path) -> None:
    both = pair("mlp", "LoraConfig", target_modules=TARGETS["mlp"], r=3, lora_alpha=4)
    other = saved(tmp_path, "mlp", r=5, lora_alpha=9)
    peftc.prepare_model_for_compiled_hotswap(both.ours, target_rank=6)
    torch._dynamo.reset()
    compiled = torch.compile(both.ours, backend="eager")
    x = both.tiny.arguments()
    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=True):
        first = compiled(**x)
        peftc.hotswap_adapter(compiled, tmp_path, "default")
        second = compiled(**x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, other.output(other.ours), rtol=1e-4, atol=1e-5)


def test_scales_are_swapped() -> None:
    options = {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}
    both, other = (pair("mlp", "IA3Config", seed=seed, **options) for seed in (1, 2))
    state = peftc.get_peft_model_state_dict(other.ours)
    peftc.hotswap_adapter_from_state_dict(both.ours, state, "default", other.ours.peft_config["default"])
    torch.testing.assert_close(both.output(both.ours), other.output(other.ours), rtol=0, atol=0)


def test_models_adapted_in_place_as_diffusers_does_it() -> None:
    state = {k.removeprefix("base_model.model."): t for k, t in _state(7, r=2).items()}
    config = {"r": 2, "lora_alpha": 9, "target_modules": ["lin0", "lin1"]}
    outputs = []
    for library, functions in ((peft, peft.utils.hotswap), (peftc, peftc)):
        base = TINY["mlp"].build()
        first = library.LoraConfig(r=3, target_modules=["lin0", "lin1"])
        model: Any = library.inject_adapter_in_model(first, base, "style", state_dict=_bare(_state(1, r=3)))
        library.set_peft_model_state_dict(model, _bare(_state(1, r=3)), "style")
        functions.prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
        second = library.LoraConfig(**config)
        functions.check_hotswap_configs_compatible(model.peft_config["style"], second)
        named = {k.replace(".weight", ".style.weight"): t.clone() for k, t in state.items()}
        functions.hotswap_adapter_from_state_dict(model=model, state_dict=named, adapter_name="style", config=second)
        outputs.append(model(**TINY["mlp"].arguments()))
    torch.testing.assert_close(outputs[1], outputs[0])


def _state(seed: int, **options: Any) -> dict[str, torch.Tensor]:
    made = pair("mlp", "LoraConfig", seed=seed, target_modules=["lin0", "lin1"], **options)
    return peft.get_peft_model_state_dict(made.theirs)


def _bare(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}


# refusals -------------------------------------------------------------------------------------------------------------


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_rslora": True}, "`use_rslora` is `True`"),
        ({"lora_dropout": 0.1}, r"`lora_dropout` is `0\.1`"),
        ({"target_modules": ["lin0", "lin2"]}, "lin2"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    both = pair("mlp", "LoraConfig", target_modules=TARGETS["mlp"], r=3)
    saved(tmp_path, "mlp", r=3, **options)
    before = everything(both.ours)
    with pytest.raises((ValueError, RuntimeError)):
        peft.utils.hotswap.hotswap_adapter(both.theirs, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(PeftcError, match=f"PC551.*{says}"):
        peftc.hotswap_adapter(both.ours, tmp_path, "default")
    assert_equal(both.ours.state_dict(), before)


def test_another_method_is_refused(tmp_path: Path) -> None:
    both = pair("mlp", "LoraConfig", target_modules=TARGETS["mlp"])
    saved(tmp_path, "mlp", config="IA3Config", feedforward_modules=[])
    with pytest.raises(PeftcError, match=r"PC551.*An adapter of IA3 cannot take the place"):
        peftc.hotswap_adapter(both.ours, tmp_path, "default")


def test_too_small_a_rank_and_a_compiled_model_are_refused() -> None:
    both = pair("mlp", "LoraConfig", target_modules=TARGETS["mlp"], r=3)
    with pytest.raises(PeftcError, match=r"PC551.*target rank 2, but the original rank is larger"):
        peftc.prepare_model_for_compiled_hotswap(both.ours, target_rank=2)
    compiled = torch.compile(both.ours, backend="eager")
    with pytest.raises(PeftcError, match="PC553"):
        peftc.prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(PeftcWarning, match="PC553"):
        peftc.prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    with pytest.raises(ValueError, match="check_compiled"):
        peftc.prepare_model_for_compiled_hotswap(compiled, check_compiled="maybe")  # type: ignore[arg-type]
    with pytest.raises(PeftcError, match="PC507"):
        peftc.prepare_model_for_compiled_hotswap(both.tiny.build())
