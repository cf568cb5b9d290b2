"""Functions on adapted models give what the reference's give: state dicts, injection, base weights, precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import peft.functional
import pytest
import torch
from safetensors.torch import save_file

import peftc
import peftc.functional
from peftc import PeftcError, PeftcWarning
from tests.e2e.pairs import CASES, LIBRARIES, TINY, Pair, assert_equal, described, moved, pair

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
