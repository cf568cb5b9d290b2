"""Functions on adapted models, with methods made for tests: what the core needs to know of a method, and no more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peftc import (
    PeftcError,
    PeftcWarning,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter_from_state_dict,
    inject_adapter_in_model,
    prepare_model_for_compiled_hotswap,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peftc.functional import delete_adapter, set_adapter
from peftc.ops.combine import closest_factors
from peftc.runtime.applying.apply import session_of
from tests.runtime.methods import Net, adapted, narrow, prompted, stretch, x

# combining ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_combinations_are_the_weighted_sum_of_updates(kind: str) -> None:
    model = adapted(narrow(r=2), other=narrow(r=1, target_modules=["second"], factor=2.0))
    layers = [model.base_model.model.first, model.base_model.model.second]
    wanted = [2 * layers[0].get_delta_weight("default"), 2 * layers[1].get_delta_weight("default")]
    wanted[1] = wanted[1] - layers[1].get_delta_weight("other")
    model.add_weighted_adapter(["default", "other"], [2.0, -1.0], "both", kind, svd_rank=3)
    for layer, update in zip(layers, wanted, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("both"), update, rtol=1e-4, atol=1e-5)
    assert model.peft_config["both"].r == 3
    assert model.active_adapters == ["default"]


def test_a_combination_has_the_trained_copy_of_the_one_that_has_it() -> None:
    model = adapted(narrow(), other=narrow(modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["other"].weight.fill_(3.0)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat")
    assert model.peft_config["both"].modules_to_save == ["head"]
    assert bool((model.base_model.model.head.modules_to_save["both"].weight == 3).all())


def test_a_combination_names_its_modules_where_targets_are_told_in_two_ways() -> None:
    model = adapted(narrow(target_modules=["first"]), other=narrow(target_modules="sec.*"))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat")
    assert model.peft_config["both"].target_modules == {"first", "second"}


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("ties", {}, "`density` is `None`"),
        ("ties", {"density": -1.0}, "`density` is `-1.0`"),
        ("ties", {"density": 0.5, "majority_sign_method": "most"}, "no sign method `most`"),
        ("sdv", {}, "Did you mean `svd`?"),
        ("svd", {"svd_rank": 0}, "`svd_rank` cannot be `0`"),
    ],
)
def test_options_of_a_combination_are_checked(kind: str, options: dict[str, Any], says: str) -> None:
    model = adapted(other=narrow())
    with pytest.raises(PeftcError) as refused:
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", kind, **options)
    assert says in str(refused.value)
    assert list(model.peft_config) == ["default", "other"]


def test_adapters_of_several_methods_are_not_combined() -> None:
    model = get_peft_model(Net(), narrow(), mixed=True)
    model.add_adapter("other", stretch())
    with pytest.raises(PeftcError, match=r"PC550.*several methods: NARROW, STRETCH"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")


def test_factors_beyond_the_rank_of_a_matrix_are_zero() -> None:
    delta = torch.randn(5, 3)
    A, B = closest_factors(delta, 6)
    assert (A.shape, B.shape) == ((6, 3), (5, 6))
    torch.testing.assert_close(B @ A, delta)


# swapping -------------------------------------------------------------------------------------------------------------


def test_a_method_without_ranks_swaps_equal_shapes() -> None:
    model, other = adapted(stretch()), adapted(stretch())
    parameter = model.base_model.model.first.stretch_l["default"]
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", stretch())
    assert torch.equal(parameter, other.base_model.model.first.stretch_l["default"])
    two = adapted(stretch(target_modules=["first", "second"]))
    before = get_peft_model_state_dict(copy.deepcopy(two))
    with pytest.raises(PeftcError, match="PC551"):  # nothing would be neutral on the second layer
        hotswap_adapter_from_state_dict(two, get_peft_model_state_dict(other), "default", stretch())
    assert all(torch.equal(t, before[key]) for key, t in get_peft_model_state_dict(two).items())
    with pytest.raises(PeftcError, match="no rank that could be raised"):
        prepare_model_for_compiled_hotswap(two, target_rank=4)


def test_padding_is_neither_saved_nor_in_the_way_of_loading() -> None:
    model = adapted(narrow(r=2))
    before, state = model(x()), get_peft_model_state_dict(copy.deepcopy(model))
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert model.base_model.model.first.narrow_A["default"].weight.shape == (5, 8)
    torch.testing.assert_close(model(x()), before)
    after = get_peft_model_state_dict(model)
    assert {key: t.shape for key, t in after.items()} == {key: t.shape for key, t in state.items()}
    set_peft_model_state_dict(model, {key: 2 * t for key, t in state.items()})
    assert torch.equal(model.base_model.model.first.narrow_A["default"].weight[:2], 2 * state[FIRST_A])
    assert bool((model.base_model.model.first.narrow_A["default"].weight[2:] == 0).all())


FIRST_A = "base_model.model.first.narrow_A.weight"


def test_a_swap_that_fails_half_way_restores_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = adapted(), adapted(narrow(r=3, factor=0.25))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    last = model.base_model.model.second

    def failing(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "exchange", failing)
    with pytest.raises(KeyboardInterrupt):
        hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", narrow(r=3, factor=0.25))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert (model.peft_config["default"].r, model.base_model.model.first.scaling) == (2, {"default": 0.5})


# models adapted in place ----------------------------------------------------------------------------------------------


def test_values_may_come_after_an_adapter_without_memory() -> None:
    source = adapted()
    state = get_peft_model_state_dict(source)
    model: Any = inject_adapter_in_model(narrow(), Net(), low_cpu_mem_usage=True)
    assert model.first.narrow_A["default"].weight.is_meta
    with pytest.raises(PeftcError, match=r"PC606.*low_cpu_mem_usage"):
        set_peft_model_state_dict(model, state)
    assert set_peft_model_state_dict(model, state, low_cpu_mem_usage=True) == ([], [])
    assert model.first.narrow_A["default"].weight.requires_grad
    set_base_model_state_dict(model, get_base_model_state_dict(source))
    torch.testing.assert_close(model(x()), source(x()))


def test_a_load_that_fails_half_way_restores_what_was() -> None:
    model: Any = inject_adapter_in_model(narrow(target_modules=["first"], modules_to_save=["head"]), Net())
    before = {key: t.clone() for key, t in model.state_dict().items()}

    class Broken(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.copy_:
                raise KeyboardInterrupt
            return super().__torch_function__(func, types, args, kwargs or {})

    state = {"first.narrow_A.weight": torch.ones(2, 8), "head.weight": torch.ones(3, 6).as_subclass(Broken)}
    with pytest.warns(PeftcWarning), pytest.raises(KeyboardInterrupt):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_nothing_that_loads_is_an_error() -> None:
    with pytest.raises(PeftcError, match="PC605"):
        set_peft_model_state_dict(adapted(), {"elsewhere.weight": torch.ones(1)})


def test_prompts_are_put_in_as_what_they_come_to() -> None:
    model = prompted()
    state = {key: torch.full_like(t, 2.0) for key, t in get_peft_model_state_dict(model).items()}
    assert set_peft_model_state_dict(model, state) == ([], [])
    assert bool((get_peft_model_state_dict(model)["prompt_embeddings"] == 2).all())


def test_all_adapters_may_be_deleted_by_name() -> None:
    base = Net()
    modules = dict(base.named_modules())
    model: Any = inject_adapter_in_model(narrow(), base, "one")
    inject_adapter_in_model(narrow(r=1), model, "two")
    set_adapter(model, ["two", "one"])
    assert delete_adapter(model, "two", "narrow_") == ["one"]
    assert delete_adapter(model, "one", "narrow_") is None
    del model.peft_config
    again = get_peft_model(model, narrow())
    assert again.base_model.model.first.base_layer is modules["first"]
    again.unload()
    assert session_of(base) is None


def test_adapters_are_switched_on_either_kind_of_model() -> None:
    model = adapted(other=narrow())
    set_adapter(model, "other", inference_mode=True)
    assert model.active_adapters == ["other"]
    assert model.get_nb_trainable_parameters()[0] == 0
    assert delete_adapter(model, "default") == ["other"]
    assert list(model.peft_config) == ["other"]


def test_base_weights_that_do_not_fit_are_all_told() -> None:
    model = adapted()
    state = get_base_model_state_dict(model)
    state["frist.weight"] = state.pop("first.weight")
    state["head.bias"] = torch.ones(4)
    with pytest.raises(PeftcError) as refused:
        set_base_model_state_dict(model, state)
    assert [d.code for d in refused.value.diagnostics] == ["PC630"] * 3
    for said in ("`first.weight`", "Did you mean `first.weight`?", "`head.bias` is (4,), in the model (3,)"):
        assert said in str(refused.value)


def test_buffers_of_the_base_keep_their_names() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    names = base.state_dict().keys()
    model = get_peft_model(base, narrow(target_modules=["0"], modules_to_save=["1"]))
    assert get_base_model_state_dict(model).keys() == names
