"""Small functions on adapted models, and those of `helpers`, do what the reference's do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import peft.functional
import peft.helpers
import pytest
import torch
from torch import nn

import peftc
import peftc.functional
import peftc.helpers
from peftc import PeftcError
from tests.e2e.pairs import CASES, LIBRARIES, described, pair

pytestmark = pytest.mark.filterwarnings("ignore")


def test_sequences_and_caches() -> None:
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    past = tuple(torch.randn(2, 3, 4, 5, 6) for _ in range(4))
    for name, arguments in {
        "shift_tokens_right": (labels, 0, 2),
        "bloom_model_postprocess_past_key_value": (past,),
    }.items():
        theirs, ours = (getattr(library, name)(*arguments) for library in LIBRARIES)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    name = "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"
    assert dict(getattr(peftc, name)) == dict(getattr(peft, name))


def test_configs_from_dictionaries_and_tables() -> None:
    options = {"peft_type": "LORA", "r": 4, "target_modules": ["q"]}
    theirs, ours = (library.get_peft_config(dict(options)) for library in LIBRARIES)
    assert (type(ours).__name__, ours.r, ours.target_modules) == (
        type(theirs).__name__,
        theirs.r,
        theirs.target_modules,
    )
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"):
        mine, other = getattr(peftc, name), getattr(peft.mapping, name)
        assert set(mine) <= {str(key.value) for key in other}
        assert [mine[key].__name__ for key in ("LORA", "IA3")] == [other[key].__name__ for key in ("LORA", "IA3")]
        assert "NONSENSE" not in mine


@pytest.mark.parametrize("method", ["forward", "generate", "all"])
def test_signatures_of_the_base_are_shown(method: str) -> None:
    both = pair("llama", "LoraConfig", r=2, task_type=None)  # of a class without a task, which says nothing itself
    shown = []
    for library, model in zip(LIBRARIES, (both.theirs, both.ours), strict=True):
        library.helpers.update_signature(model, method)
        shown.append({n: inspect.signature(getattr(model, n)).parameters.keys() for n in ("forward", "generate")})
    for name in ("forward", "generate"):
        if method in (name, "all"):
            assert shown[1][name] == shown[0][name]
    both.assert_alike()


def test_helpers_ask_for_what_they_have() -> None:
    ours = pair("llama", "LoraConfig", r=2).ours
    with pytest.raises(ValueError, match="forwards"):
        peftc.helpers.update_signature(ours, "forwards")
    with pytest.raises(AttributeError):
        _ = peftc.helpers.nothing  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = peftc.functional.nothing  # type: ignore[attr-defined]
    assert set(peftc.functional.__all__) == set(peft.functional.__all__)


def test_scales_are_multiplied_for_a_while() -> None:
    both = pair("mlp", "LoraConfig", **CASES["lora"][2])
    before = both.output(both.ours)
    with peft.helpers.rescale_adapter_scale(both.theirs, 0.3), peftc.helpers.rescale_adapter_scale(both.ours, 0.3):
        both.assert_alike()
        assert not torch.allclose(both.output(both.ours), before)
    torch.testing.assert_close(both.output(both.ours), before, rtol=0, atol=0)
    for model, multiplier in ((both.ours, "half"), (pair("mlp", *CASES["ia3"][1:2], **CASES["ia3"][2]).ours, 0.5)):
        with pytest.raises((ValueError, TypeError)), peftc.helpers.rescale_adapter_scale(model, multiplier):
            pass


def test_input_casting_is_switched_off_for_a_while() -> None:
    ours = pair("mlp", "LoraConfig", **CASES["lora"][2]).ours
    layer = ours.base_model.model.lin0
    with peftc.helpers.disable_input_dtype_casting(ours, active=False):
        assert layer.cast_input_dtype_enabled
    with peftc.helpers.disable_input_dtype_casting(ours):
        assert not layer.cast_input_dtype_enabled
    assert layer.cast_input_dtype_enabled


def test_an_adapter_is_known_by_its_config(tmp_path: Path) -> None:
    assert not peftc.helpers.check_if_peft_model(tmp_path)
    peftc.LoraConfig(target_modules=["q"]).save_pretrained(tmp_path)
    assert peftc.helpers.check_if_peft_model(tmp_path)


def test_gradients_are_switched_by_name() -> None:
    both = pair("mlp", "LoraConfig", **CASES["lora"][2])
    both.add("second", "LoraConfig", 2, **CASES["lora"][2])
    for library, model in zip(LIBRARIES, (both.theirs, both.ours), strict=True):
        library.functional.set_requires_grad(model, "default", requires_grad=False)
        library.functional.set_requires_grad(model, ["second"])
    assert described(both.ours) == described(both.theirs)
    with pytest.raises(PeftcError, match="PC502"):
        peftc.functional.set_requires_grad(both.ours, ["nobody"])


def test_a_run_is_described_beside_the_adapter(tmp_path: Path) -> None:
    for library in LIBRARIES:
        config = library.LoraConfig(
            target_modules=["q"], runtime_config=library.LoraRuntimeConfig(ephemeral_gpu_offload=True)
        )
        assert "runtime_config" not in config.to_dict()
        config.save_pretrained(str(tmp_path))
        assert "ephemeral" not in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
        assert library.LoraConfig(target_modules=["q"]).runtime_config.ephemeral_gpu_offload is False


def test_empty_adapters_wait_for_their_values() -> None:
    both = pair("mlp", "LoraConfig", **CASES["lora"][2])
    state = peft.get_peft_model_state_dict(both.theirs)
    for library in LIBRARIES:
        config = library.LoraConfig(**CASES["lora"][2])
        made = library.get_peft_model(both.tiny.build(), config, low_cpu_mem_usage=True).eval()
        made.add_adapter("second", config, low_cpu_mem_usage=True)
        assert {p.device.type for n, p in made.named_parameters() if ".lora_" in n} == {"meta"}
        for name in ("default", "second"):
            library.set_peft_model_state_dict(made, state, name, low_cpu_mem_usage=True)
        assert not any(p.is_meta for p in made.parameters())
        torch.testing.assert_close(both.output(made), both.output(both.ours))


def test_scalings_that_are_exchanged_take_effect() -> None:
    both = pair("mlp", "LoraConfig", **CASES["lora"][2])
    as_it_was = both.output(both.ours)
    for library, model in ((peft, both.theirs), (peftc, both.ours)):
        for layer in (module for module in model.modules() if hasattr(module, "scaling")):
            before = layer.scaling
            with library.helpers.rescale_adapter_scale(model, 0.5):
                assert layer.scaling["default"] == 0.5 * before["default"]
            assert layer.scaling == before
            layer.scaling = {name: 3 * scale for name, scale in before.items()}
    both.assert_alike()
    assert not torch.allclose(both.output(both.ours), as_it_was)


def test_what_is_added_or_deleted_while_rescaled_keeps_its_own_scaling() -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["0"]}
    model = peftc.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peftc.LoraConfig(**options))
    model.add_adapter("second", peftc.LoraConfig(**options, lora_alpha=4))
    with peftc.helpers.rescale_adapter_scale(model, 0.5):
        model.delete_adapter("second")
        model.add_adapter("third", peftc.LoraConfig(**options, lora_alpha=6))
    assert model.base_model.model[0].scaling == {"default": 4.0, "third": 3.0}
