"""Deleting active adapters: what acts and what trains afterwards, on every kind of model, with all that an adapter may train.

The kit holds the plain case for every method (`another_takes_over`); here are copies, several at once, and other states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from peftc import PeftcError, PeftModel, get_peft_model, inject_adapter_in_model, rules
from peftc.functional import delete_adapter, set_adapter
from peftc.model.injected import adapters_of
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session import succession
from tests.defects import put_defect
from tests.runtime.methods import Net, adapted, mix, narrow, preface, prompted, stretch, x

#: a model that is deleted from, and the call that deletes
Delete = Callable[[nn.Module, str], object]


def told(act: Callable[[], object]) -> list[str]:
    """What the call says of deleted adapters."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        act()
    return [str(w.message).partition("\n")[0] for w in seen if rules.ACTIVE_DELETED.code in str(w.message)]


def trained(model: nn.Module) -> list[str]:
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def copied(*names: str) -> PeftModel:
    """A net with adapters that train the head whole beside their layers."""
    model = adapted(narrow(modules_to_save=["head"]), **{name: narrow(modules_to_save=["head"]) for name in names})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(len(name))
    return model


def by_layers(model: nn.Module, name: str) -> None:
    """As libraries delete that go through a model themselves."""
    for module in list(model.modules()):
        if isinstance(module, TunerLayer):
            module.delete_adapter(name)
    model.__dict__["peft_config"].pop(name)


def by_function(model: nn.Module, name: str) -> None:
    """As transformers deletes."""
    delete_adapter(model, name)
    model.__dict__["peft_config"].pop(name)


# what trains ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("delete", [PeftModel.delete_adapter, delete_adapter], ids=["model", "function"])
def test_copies_of_the_heir_act_and_train_as_those_of_the_deleted_did(delete: Delete, frozen: bool) -> None:
    model = copied("other")
    wanted, names = model(x()), trained(model)
    assert len(names) == 6, "two layers of two factors, and a head with a bias"
    model.set_adapter("other", inference_mode=frozen)
    assert not torch.equal(model(x()), wanted)
    assert told(lambda: delete(model, "other")) == [
        "warning[PC560]: `other` was active and is deleted; `default` is active now"
    ]
    assert torch.equal(model(x()), wanted)
    assert trained(model) == ([] if frozen else names)


def test_a_loaded_frozen_adapter_hands_on_nothing_to_train(tmp_path: Path) -> None:
    adapted(other=narrow()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Net(), tmp_path)
    model.load_adapter(tmp_path / "other", "other")
    told(lambda: model.delete_adapter("default"))
    assert (model.active_adapters, trained(model)) == (["other"], [])


def test_an_inactive_adapter_leaves_everything_as_it_is() -> None:
    model = copied("other")
    before, names = model(x()), trained(model)
    assert told(lambda: model.delete_adapter("other")) == []
    assert torch.equal(model(x()), before)
    assert trained(model) == names


def test_of_several_active_ones_the_others_go_on() -> None:
    model = adapted(b=narrow(), c=narrow())
    model.set_adapter("b")
    wanted, names = model(x()), trained(model)
    model.set_adapter(["default", "b"])
    assert told(lambda: model.delete_adapter("default")) == []
    assert torch.equal(model(x()), wanted)
    assert (model.active_adapters, trained(model)) == (["b"], names)


def test_the_heir_is_the_first_by_name_on_layers_and_the_first_come_of_prompts() -> None:
    layers = adapted(zebra=narrow(), ape=narrow())
    told(lambda: layers.delete_adapter("default"))
    assert layers.active_adapters == ["ape"]
    prompts = prompted()
    for name in ("zebra", "ape"):
        prompts.add_adapter(name, preface())
    told(lambda: prompts.delete_adapter("default"))
    assert prompts.active_adapters == ["zebra"]
    assert trained(prompts) == ["prompt_encoder.zebra.embedding.weight"]


# lists ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True], ids=["one method", "mixed"])
@pytest.mark.parametrize("level", [lambda m: m, lambda m: m.base_model], ids=["model", "level"])
def test_several_are_deleted_at_once(level: Callable[[PeftModel], PeftModel], mixed: bool) -> None:
    model = get_peft_model(Net(), narrow(), mixed=mixed)
    model.add_adapter("b", stretch() if mixed else narrow())
    model.add_adapter("c", narrow())
    model.set_adapter("c")
    wanted = model(x())
    model.set_adapter(["default", "b"])
    assert len(told(lambda: level(model).delete_adapter(["default", "b"]))) == 1
    assert (list(model.peft_config), model.active_adapters) == (["c"], ["c"])
    assert torch.equal(model(x()), wanted)


def test_one_that_is_not_there_leaves_all_of_a_list() -> None:
    model = adapted(b=narrow())
    before, names = model(x()), trained(model)
    with pytest.raises(PeftcError, match="nobody"):
        model.delete_adapter(["b", "nobody"])
    assert list(model.peft_config) == ["default", "b"]
    model.set_adapter("default")
    assert torch.equal(model(x()), before)
    assert trained(model) == names


def test_a_merged_one_leaves_all_of_a_list() -> None:
    model = adapted(b=narrow())
    model.merge_adapter()
    with pytest.raises(PeftcError, match=rules.WHILE_MERGED.code):
        model.delete_adapter(["b", "default"])
    assert list(model.peft_config) == ["default", "b"]


# other states -----------------------------------------------------------------------------------------------------------


def test_the_heir_does_not_act_while_all_are_disabled() -> None:
    model = adapted(b=narrow())
    wanted = model(x())
    model.set_adapter("b")
    with model.disable_adapter():
        bare = model(x())
        told(lambda: model.delete_adapter("b"))
        assert torch.equal(model(x()), bare)
    assert torch.equal(model(x()), wanted)


def test_an_heir_beside_a_merged_adapter_acts_alone() -> None:
    """Merged adapters act until they are taken out, which activating others does."""
    model = adapted(b=narrow(), c=narrow())
    wanted = model(x())
    model.set_adapter("b")
    model.merge_adapter(["c"])
    told(lambda: model.delete_adapter("b"))
    assert (model.active_adapters, model.session.merged) == (["c"], ())
    told(lambda: model.delete_adapter("c"))
    assert torch.equal(model(x()), wanted)


def test_a_weighing_adapter_takes_what_it_weighs_along() -> None:
    model = adapted(mix(narrow(), narrow()))
    with model.disable_adapter():
        bare = model(x())
    with pytest.raises(PeftcError, match="part of `default`"):
        model.delete_adapter("default_p0")
    assert len(told(lambda: model.delete_adapter("default"))) == 1
    assert (torch.equal(model(x()), bare), trained(model)) == (True, [])


# the last one -----------------------------------------------------------------------------------------------------------


def last_gone() -> Iterator[PeftModel]:
    for model in (copied(), prompted(), get_peft_model(Net(), stretch(), mixed=True)):
        assert told(lambda model=model: model.delete_adapter("default")) == [
            "warning[PC560]: `default` was active and is deleted; no adapter is left, and the model computes as its base"
        ]
        yield model


def test_properties_of_a_model_without_adapters_do_not_raise() -> None:
    for model in last_gone():
        assert (model.active_adapters, model.has_active_enabled_adapter) == ([], False)
        assert not model.active_adapter
        assert trained(model) == []
        with pytest.raises(PeftcError, match=rules.NOT_ADAPTED.code):
            _ = model.active_peft_config


def test_a_level_without_adapters_has_none_active() -> None:
    model = adapted()
    level = model.base_model
    told(lambda: level.delete_adapter("default"))
    assert (level.active_adapters, level.active_adapter) == ([], [])
    model.unload()
    assert level.active_adapters == []


def test_another_can_be_added_after_the_last() -> None:
    for model in last_gone():
        model.add_adapter("again", preface() if model.peft_type == "PREFACE" else narrow())
        model.set_adapter("again")
        assert model.active_adapters == ["again"]
        assert trained(model) != []


def test_nothing_is_saved_or_merged_of_a_model_without_adapters(tmp_path: Path) -> None:
    model = next(last_gone())
    with pytest.raises(PeftcError, match=rules.NOT_ADAPTED.code):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="nothing is merged"):
        model.merge_adapter()


# adapted in place -------------------------------------------------------------------------------------------------------


def in_place(*names: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for name in names:
        inject_adapter_in_model(narrow(), model, name)
    return model


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("delete", [by_function, by_layers])
def test_of_a_model_adapted_in_place(delete: Delete, frozen: bool) -> None:
    model = in_place("one", "two")
    set_adapter(model, "one")
    wanted, names = model(x()), trained(model)
    set_adapter(model, "two", inference_mode=frozen)
    said = told(lambda: delete(model, "two"))
    assert said == ["warning[PC560]: `two` was active and is deleted; `one` is active now"]
    assert torch.equal(model(x()), wanted)
    assert adapters_of(model).active == ("one",)
    assert trained(model) == ([] if frozen else names)
    told(lambda: delete(model, "one"))
    assert torch.equal(model(x()), in_place()(x()))
    assert trained(model) == []


def test_layers_that_have_no_other_adapter_follow_those_that_have() -> None:
    model = Net()
    inject_adapter_in_model(narrow(target_modules=["second"]), model, "one")
    inject_adapter_in_model(narrow(target_modules=["first", "second", "head"]), model, "two")
    assert len(told(lambda: by_layers(model, "two"))) == 1
    assert adapters_of(model).active == ("one",)
    assert trained(model) == ["second.narrow_A.one.weight", "second.narrow_B.one.weight"]


def test_a_layer_keeps_to_what_is_active_elsewhere() -> None:
    """`second` loses its only active adapter while another is active on `first`: nothing takes over."""
    model = Net()
    inject_adapter_in_model(narrow(target_modules=["first"]), model, "one")
    inject_adapter_in_model(narrow(target_modules=["second"]), model, "two")
    inject_adapter_in_model(narrow(target_modules=["second"]), model, "idle")
    set_adapter(model, ["one", "two"])
    assert told(lambda: by_layers(model, "two")) == []
    assert adapters_of(model).active == ("one",)


# the tests can fail -----------------------------------------------------------------------------------------------------


def test_without_an_heir_the_tests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, succession, "if acted and not session.active:", "if False:")
    model = adapted(b=narrow())
    assert told(lambda: model.delete_adapter("default")) == []


# what others leave behind ---------------------------------------------------------------------------------------------


def test_adapters_are_saved_while_none_is_active(tmp_path: Path) -> None:
    model = adapted()
    model.delete_adapter("default")
    model.add_adapter("default", narrow())
    assert model.active_adapters == []
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file()


def test_a_prompt_that_takes_over_is_the_only_one_that_trains() -> None:
    model = prompted()
    for name in ("b", "c"):
        model.add_adapter(name, preface())
    model.set_adapter("b", inference_mode=True)
    model.set_requires_grad("c")
    model.delete_adapter("b")
    assert model.active_adapters == ["default"] and trained(model) == []


def test_an_adapter_that_came_onto_a_layer_while_all_were_switched_off_is_seen_once_it_is_merged() -> None:
    model = adapted()
    with model.disable_adapter():
        model.delete_adapter("default")
        model.add_adapter("other", narrow())
    bare = model(x())
    model.merge_adapter(["other"])
    assert not torch.allclose(model(x()), bare)


def test_a_weighted_router_and_what_it_trains_along_stop_together() -> None:
    model = adapted(mix(narrow(), trains=True))
    assert any("narrow_" in name for name in trained(model))
    model.set_requires_grad("default", False)
    assert trained(model) == []
    model.set_requires_grad("default")
    assert any("narrow_" in name for name in trained(model))


def test_an_adapter_that_does_not_act_trains_nothing_of_the_base(tmp_path: Path) -> None:
    config = narrow(bias="all")
    adapted(config).save_pretrained(tmp_path)
    model = adapted(config)
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert trained(model) and not any("bias" in name for name in trained(model))
    model.set_adapter("default")
    assert any("bias" in name for name in trained(model))


def test_a_weighted_sum_in_float64_is_as_exact_as_that() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net().double(), narrow())
    wanted = model(x().double())
    model.base_model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x().double()), wanted, rtol=1e-12, atol=1e-12)
