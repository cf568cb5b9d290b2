"""Functions on adapted models give what the reference's give: state dicts, injection, base weights, precision, helpers."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import peft.functional
import peft.helpers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peftc
import peftc.functional
import peftc.helpers
from peftc import PeftcError, PeftcWarning
from tests.e2e.pairs import TINY, Pair, assert_equal, moved, pair

LIBRARIES: tuple[Any, Any] = (peft, peftc)

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("mlp", "LoraConfig", {"target_modules": ["lin0", "lin1"], "r": 3}),
    "lora with biases": ("mlp", "LoraConfig", {"target_modules": ["lin0"], "r": 3, "bias": "all"}),
    "lora with a module": (
        "mlp",
        "LoraConfig",
        {"target_modules": ["lin0"], "r": 3, "modules_to_save": ["lin2", "norm"]},
    ),
    "lora on embeddings": ("llama", "LoraConfig", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 3}),
    "lora on convolutions": ("conv2d", "LoraConfig", {"target_modules": ["conv1", "head"], "r": 3}),
    "ia3": ("mlp", "IA3Config", {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}),
    "hra": ("mlp", "HRAConfig", {"target_modules": ["lin0", "lin1"], "r": 2}),
}
ON_LAYERS = pytest.mark.parametrize(("model", "config", "options"), CASES.values(), ids=CASES)

pytestmark = pytest.mark.filterwarnings("ignore")


def injected(model: str, config: str, options: dict[str, Any], **further: Any) -> Pair:
    """A tiny model adapted in place by both libraries, one adapter with equal tensors."""
    made = [
        lib.inject_adapter_in_model(getattr(lib, config)(**options), TINY[model].build(), **further)
        for lib in LIBRARIES
    ]
    return Pair(TINY[model], *made)


# state dicts ----------------------------------------------------------------------------------------------------------


@ON_LAYERS
def test_state_dicts_of_adapters_are_equal(model: str, config: str, options: dict[str, Any]) -> None:
    for both in (pair(model, config, **options), injected(model, config, options)):
        moved(both.theirs, "default", 4)
        theirs = peft.get_peft_model_state_dict(both.theirs)
        result = peftc.set_peft_model_state_dict(both.ours, theirs)
        assert result == ([], [])
        assert_equal(peftc.get_peft_model_state_dict(both.ours), theirs)
        gathered = peftc.get_peft_model_state_dict(both.ours, state_dict=both.theirs.state_dict())
        assert_equal(gathered, theirs)


def test_state_dicts_of_prompts_are_equal() -> None:
    both = pair("llama", "PromptTuningConfig", num_virtual_tokens=3)
    theirs = peft.get_peft_model_state_dict(both.theirs)
    assert_equal(peftc.get_peft_model_state_dict(both.ours), theirs)
    assert_equal(peftc.get_peft_model_state_dict(both.ours, state_dict=both.ours.state_dict()), theirs)


def test_names_of_the_live_model_and_keys_without_a_root_are_understood() -> None:
    both = pair("mlp", "LoraConfig", **CASES["lora"][2])
    state = peftc.get_peft_model_state_dict(both.ours)
    live = {name: tensor for name, tensor in both.ours.state_dict().items() if ".lora_" in name}
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    for given in (live, bare):
        assert peftc.set_peft_model_state_dict(both.ours, {k: torch.ones_like(t) for k, t in given.items()}) == ([], [])
        assert all(bool((t == 1).all()) for t in peftc.get_peft_model_state_dict(both.ours).values())


def test_what_is_missing_or_left_over_is_in_the_result() -> None:
    both = injected("mlp", "LoraConfig", CASES["lora"][2])
    state = {"lin0.lora_A.weight": torch.ones(3, 12), "stray": torch.ones(1)}
    for library, model in zip(LIBRARIES, (both.theirs, both.ours), strict=True):
        missing, unexpected = library.set_peft_model_state_dict(model, state)
        assert sorted(key for key in missing if "lora_" in key) == [
            "lin0.lora_B.default.weight",
            "lin1.lora_A.default.weight",
            "lin1.lora_B.default.weight",
        ]
        assert unexpected == ["stray"]
        assert bool((model.lin0.lora_A["default"].weight == 1).all())


def test_other_shapes_are_refused_with_nothing_changed_or_left_out() -> None:
    both = injected("mlp", "LoraConfig", CASES["lora"][2])
    before = {key: tensor.clone() for key, tensor in both.ours.state_dict().items()}
    state = {"lin0.lora_A.weight": torch.ones(3, 12), "lin0.lora_B.weight": torch.ones(20, 4)}
    with pytest.raises(PeftcError, match="PC606"):
        peftc.set_peft_model_state_dict(both.ours, state)
    assert_equal(both.ours.state_dict(), before)
    for library, model in zip(LIBRARIES, (both.theirs, both.ours), strict=True):
        result = library.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
        assert "lin0.lora_B.default.weight" in result.missing_keys
        assert bool((model.lin0.lora_A["default"].weight == 1).all())


def test_a_state_dict_that_lacks_part_of_the_adapter_is_refused() -> None:
    ours = pair("mlp", "LoraConfig", **CASES["lora"][2]).ours
    state = {key: tensor for key, tensor in ours.state_dict().items() if "lin0.lora_A" not in key}
    with pytest.raises(PeftcError, match=r"PC611.*lin0\.lora_A\.weight"):
        peftc.get_peft_model_state_dict(ours, state_dict=state)
    assert peftc.get_peft_model_state_dict(ours, state_dict={}) == {}


def test_a_compiled_model_is_seen_through() -> None:
    both = pair("mlp", "LoraConfig", **CASES["lora"][2])
    compiled = torch.compile(both.ours, backend="eager")
    theirs = peft.get_peft_model_state_dict(torch.compile(both.theirs, backend="eager"), unwrap_compiled=True)
    assert_equal(peftc.get_peft_model_state_dict(compiled, unwrap_compiled=True), theirs)


# injection ------------------------------------------------------------------------------------------------------------


def described(model: nn.Module) -> dict[str, Any]:
    return {n: (tuple(p.shape), p.dtype, p.device.type, p.requires_grad) for n, p in model.named_parameters()}


@ON_LAYERS
@pytest.mark.parametrize("low", [False, True], ids=["", "low"])
def test_the_modules_of_a_state_dict_are_adapted(model: str, config: str, options: dict[str, Any], low: bool) -> None:
    source = injected(model, config, {**options, "target_modules": options["target_modules"][-1:]})
    moved(source.theirs, "default", 5)
    state = peft.get_peft_model_state_dict(source.theirs, save_embedding_layers=False)
    both = injected(model, config, options, state_dict=state, low_cpu_mem_usage=low)
    assert described(both.ours) == described(both.theirs)
    for library, made in zip(LIBRARIES, (both.theirs, both.ours), strict=True):
        library.set_peft_model_state_dict(made, state, low_cpu_mem_usage=low)
    assert described(both.ours) == described(both.theirs)
    both.assert_alike()


def test_a_state_dict_and_a_config_that_differ_are_told_of() -> None:
    state = {"lin1.lora_A.weight": torch.ones(3, 20)}
    with pytest.warns(PeftcWarning, match="only the config has `lin0` and only the given paths have `lin1`"):
        peftc.inject_adapter_in_model(peftc.LoraConfig(target_modules=["lin0"]), TINY["mlp"].build(), state_dict=state)


def test_adapters_are_in_the_dtype_of_their_layers() -> None:
    for library in LIBRARIES:
        base = TINY["mlp"].build(torch.bfloat16)
        made = library.inject_adapter_in_model(library.LoraConfig(**CASES["lora"][2]), base)
        assert made.lin0.lora_A["default"].weight.dtype is torch.bfloat16
        library.functional.cast_adapter_dtype(made, "default")
        assert made.lin0.lora_A["default"].weight.dtype is torch.float32
        assert made.lin0.base_layer.weight.dtype is torch.bfloat16


def test_a_further_adapter_is_the_active_one() -> None:
    both = injected("mlp", "LoraConfig", CASES["lora"][2], adapter_name="one")
    for library, made in zip(LIBRARIES, (both.theirs, both.ours), strict=True):
        library.inject_adapter_in_model(library.LoraConfig(target_modules=["lin1"]), made, "two")
        assert list(made.peft_config) == ["one", "two"]
        assert made.lin1.active_adapters == ["two"]


def test_the_attribute_with_the_configs_may_be_deleted_and_layers_unwrapped() -> None:
    """As diffusers does it: every wrapper is replaced by its base layer and the attribute deleted."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    for library in LIBRARIES:
        base = TINY["mlp"].build()
        modules = dict(base.named_modules())
        made = library.inject_adapter_in_model(library.LoraConfig(**CASES["lora"][2]), base)
        for name in ("lin0", "lin1"):
            setattr(made, name, getattr(made, name).base_layer)
        del made.peft_config
        again = library.inject_adapter_in_model(library.LoraConfig(target_modules=["lin2"]), made)
        assert list(again.peft_config) == ["default"]
        assert again.lin0 is modules["lin0"]
    assert recurse_remove_peft_layers is not None


def test_adapters_that_others_delete_layer_by_layer_are_gone() -> None:
    """As diffusers' `delete_adapters`: layer by layer, then out of the attribute."""
    made = peftc.inject_adapter_in_model(peftc.LoraConfig(**CASES["lora"][2]), TINY["mlp"].build(), "one")
    peftc.inject_adapter_in_model(peftc.LoraConfig(**CASES["lora"][2]), made, "two")
    for layer in (made.lin0, made.lin1):
        layer.set_adapter("one")
        layer.delete_adapter("two")
    made.peft_config.pop("two")
    peftc.inject_adapter_in_model(peftc.LoraConfig(**CASES["lora"][2]), made, "three")
    assert list(made.peft_config) == ["one", "three"]
    peftc.functional.set_adapter(made, ["one", "three"])
    assert peftc.functional.delete_adapter(made, "three") == ["one"]
    assert made.lin0.active_adapters == ["one"]


def test_a_refused_injection_changes_nothing() -> None:
    made = peftc.inject_adapter_in_model(peftc.LoraConfig(**CASES["lora"][2]), TINY["mlp"].build())
    before = described(made)
    for config, name in (
        (peftc.LoraConfig(target_modules=["x"]), "default"),
        (peftc.LoraConfig(target_modules=["x"]), "b"),
    ):
        with pytest.raises(PeftcError):
            peftc.inject_adapter_in_model(config, made, name)
    assert (described(made), list(made.peft_config)) == (before, ["default"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "PeftModel"])
@pytest.mark.parametrize("meta", [False, True], ids=["made", "low_cpu_mem_usage"])
def test_injecting_under_a_name_that_is_there_replaces_as_in_the_reference(wrapped: bool, meta: bool) -> None:
    """The layers have the new adapter's slots alone, whose values are set and used; another adapter stays as it is."""
    options = CASES["lora"][2]
    results = []
    for library in (peft, peftc):
        model = TINY["mlp"].build()
        old, new = library.LoraConfig(**{**options, "r": 2}), library.LoraConfig(**{**options, "r": 3})
        beside = library.LoraConfig(**{**options, "r": 4})
        if wrapped:
            model = library.get_peft_model(model, old)
            model.add_adapter("beside", beside)
        else:
            model = library.inject_adapter_in_model(old, model)
            library.inject_adapter_in_model(beside, model, "beside")
        assert library.inject_adapter_in_model(new, model, low_cpu_mem_usage=meta) is model
        state = library.get_peft_model_state_dict(model)
        filled = {key: torch.full(value.shape, 0.1) for key, value in state.items()}
        library.set_peft_model_state_dict(model, filled, low_cpu_mem_usage=meta)
        results.append((model, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))
    (theirs, names), (ours, own) = results
    assert own == names
    assert {name: config.r for name, config in ours.peft_config.items()} == {"default": 3, "beside": 4}
    for model in (theirs, ours):
        peftc.functional.set_adapter(model, "default") if model is ours else peft.functional.set_adapter(
            model, "default"
        )
    x = TINY["mlp"].arguments()
    with torch.no_grad():
        torch.testing.assert_close(ours(**x), theirs(**x))


def test_a_merged_adapter_makes_no_room() -> None:
    made = peftc.get_peft_model(TINY["mlp"].build(), peftc.LoraConfig(**CASES["lora"][2]))
    made.merge_adapter()
    with pytest.raises(PeftcError, match="PC509"):
        peftc.inject_adapter_in_model(peftc.LoraConfig(**CASES["lora"][2]), made)
    assert made.session.merged == ("default",)


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mapping", [None, {"^lin": "layer_"}, {"lin0": "first", "lin": "other"}, {r"lin(\d)": r"\1.lin"}], ids=str
)
def test_weights_are_read_and_renamed(mapping: dict[str, str] | None, tmp_path: Path) -> None:
    state = peft.get_peft_model_state_dict(pair("mlp", "LoraConfig", **CASES["lora"][2]).theirs)
    (tmp_path / "sub").mkdir()
    save_file(state, tmp_path / "sub" / "adapter_model.safetensors")
    theirs, ours = (
        library.load_peft_weights(str(tmp_path), device="cpu", key_mapping=mapping, subfolder="sub")
        for library in LIBRARIES
    )
    assert_equal(ours, theirs)


def test_two_keys_may_not_become_one(tmp_path: Path) -> None:
    state = peft.get_peft_model_state_dict(pair("mlp", "LoraConfig", **CASES["lora"][2]).theirs)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PeftcError, match="PC640"):
        peftc.load_peft_weights(tmp_path, key_mapping={r"lin\d": "lin"})
    with pytest.raises(PeftcError, match="PC403"):
        peftc.load_peft_weights(tmp_path, key_mapping={r"lin(\d": "lin"})
    with pytest.raises(PeftcError, match="PC403"):
        peftc.load_peft_weights(tmp_path, key_mapping={"lin": r"\7"})
    with pytest.raises(PeftcError, match="is no device"):
        peftc.load_peft_weights(tmp_path, device="nowhere")


# the base model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora", "lora with a module", "lora on embeddings", "ia3"])
def test_base_weights_have_the_names_of_the_base(case: str) -> None:
    model, config, options = CASES[case]
    both = pair(model, config, **options)
    theirs = peft.get_base_model_state_dict(both.theirs)
    ours = peftc.get_base_model_state_dict(both.ours)
    assert_equal(ours, theirs)
    assert ours.keys() == TINY[model].build().state_dict().keys()
    live = {tensor.data_ptr() for tensor in both.ours.state_dict().values()}
    assert all(tensor.data_ptr() in live for tensor in ours.values()), "copied"
    other = {key: tensor + 1 for key, tensor in theirs.items()}
    adapter = copy.deepcopy(peftc.get_peft_model_state_dict(both.ours, save_embedding_layers=False))
    for library, adapted in zip(LIBRARIES, (both.theirs, both.ours), strict=True):
        assert library.set_base_model_state_dict(adapted, other) == ([], [])
    assert_equal(peftc.get_base_model_state_dict(both.ours), peft.get_base_model_state_dict(both.theirs))
    assert_equal(peftc.get_peft_model_state_dict(both.ours, save_embedding_layers=False), adapter)


def test_base_weights_that_do_not_fit_are_refused() -> None:
    ours = pair("mlp", "LoraConfig", **CASES["lora"][2]).ours
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    state = peftc.get_base_model_state_dict(ours)
    first, *rest = state
    cases = {
        "Missing": {key: state[key] + 1 for key in rest},
        "without a place": {**{k: t + 1 for k, t in state.items()}, "stray": torch.ones(1)},
        "another shape": {**{k: t + 1 for k, t in state.items()}, first: torch.ones(1)},
    }
    for says, given in cases.items():
        with pytest.raises(PeftcError, match=f"PC630.*{says}"):
            peftc.set_base_model_state_dict(ours, given)
        assert_equal(ours.state_dict(), before)
    assert peftc.set_base_model_state_dict(ours, {first: state[first], "stray": state[first]}, strict=False) == (
        rest,
        ["stray"],
    )


def test_prompts_have_the_base_as_it_is() -> None:
    both = pair("llama", "PromptTuningConfig", num_virtual_tokens=3)
    assert_equal(peftc.get_base_model_state_dict(both.ours), peft.get_base_model_state_dict(both.theirs))


# precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", ["", "is_loaded_in_8bit", "gptq"])
@pytest.mark.parametrize("reentrant", [None, False])
def test_a_quantised_model_is_made_ready(quantised: str, reentrant: bool | None) -> None:
    ready = []
    for library in LIBRARIES:
        model: Any = TINY["llama"].build(torch.bfloat16)
        if quantised == "gptq":
            model.quantization_method = "gptq"
        elif quantised:
            setattr(model, quantised, True)
        options = None if reentrant is None else {"use_reentrant": reentrant}
        assert library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options) is model
        inputs = model.get_input_embeddings()(torch.tensor([[3, 4]]))
        ready.append((described(model), model.is_gradient_checkpointing, inputs.requires_grad))
    assert ready[1] == ready[0]


def test_frozen_tensors_are_cast() -> None:
    both = pair("mlp", "LoraConfig", **CASES["lora"][2])
    for library, model in zip(LIBRARIES, (both.theirs, both.ours), strict=True):
        library.cast_mixed_precision_params(model, torch.float16)
    assert described(both.ours) == described(both.theirs)


# small functions ------------------------------------------------------------------------------------------------------


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
