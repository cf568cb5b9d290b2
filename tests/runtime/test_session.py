"""The life of adapters on a live model: who trains, who acts, what is put back, and which objects stay the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, PeftModel, compile_plan, get_peft_model, inject_adapter_in_model, rules
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.functional import set_adapter
from peftc.runtime.applying.apply import apply_plan
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.layer.wrapper import BaseTunerLayer
from tests.runtime.methods import LANGUAGE_MODEL, Net, adapted, narrow, prompted, x


def trained(model: nn.Module) -> list[str]:
    """Names of what trains, shortened to what tells them apart."""
    return [name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(model: nn.Module) -> None:
    """One step of gradient descent, far enough to be seen."""
    model(x()).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.sign()
                parameter.grad = None


FACTORS = [
    "first.narrow_A.{}.weight",
    "first.narrow_B.{}.weight",
    "second.narrow_A.{}.weight",
    "second.narrow_B.{}.weight",
]


def factors(*adapters: str) -> list[str]:
    return [name.format(adapter) for adapter in adapters for name in FACTORS]


# who trains -----------------------------------------------------------------------------------------------------------


def test_exactly_the_active_adapters_train() -> None:
    model = adapted(other=narrow(r=3))
    assert (model.active_adapters, sorted(trained(model))) == (["default"], sorted(factors("default")))
    model.set_adapter("other")
    assert (model.active_adapter, sorted(trained(model))) == ("other", sorted(factors("other")))
    model.set_adapter(["other", "default"])
    assert (model.active_adapters, sorted(trained(model))) == (
        ["other", "default"],
        sorted(factors("other", "default")),
    )
    model.set_adapter("default", inference_mode=True)
    assert trained(model) == []


def test_what_the_user_froze_in_another_adapter_stays_frozen() -> None:
    model = adapted(other=narrow(), third=narrow())
    model.set_adapter("other")
    third = [p for name, p in model.named_parameters() if ".third." in name]
    third[0].requires_grad_(True)
    model.set_adapter("default")
    assert third[0].requires_grad  # neither active before nor after: nobody else's business


def test_a_prompt_of_another_adapter_does_not_train() -> None:
    model = prompted()
    model.add_adapter("other", type(model.peft_config["default"])(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert trained(model) == ["prompt_encoder.default.embedding.weight"]
    model.set_adapter("other")
    assert trained(model) == ["prompt_encoder.other.embedding.weight"]


def test_counts() -> None:
    model = adapted(narrow(target_modules=["first"], r=2), other=narrow(target_modules=["second"], r=1))
    base = sum(p.numel() for p in Net().parameters())
    assert model.get_nb_trainable_parameters() == (2 * (8 + 8), base + 2 * (8 + 8) + 1 * (8 + 6))


def test_printed_counts(capsys: pytest.CaptureFixture[str]) -> None:
    adapted(narrow(target_modules=["first"])).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 32 || all params: 179 || trainable%: 17.8771\n"


# who acts -------------------------------------------------------------------------------------------------------------


def test_disabling_is_nested_and_survives_an_exception() -> None:
    model = adapted()
    base = values(model)
    acting, trains = model(x()), trained(model)
    with model.disable_adapter():
        bare = model(x())
        with model.disable_adapter():
            assert torch.equal(model(x()), bare)
        assert torch.equal(model(x()), bare), "the inner block switched the adapter on"
        assert trained(model) == trains
    assert torch.equal(model(x()), acting)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError("anything")
    assert torch.equal(model(x()), acting)
    assert not torch.equal(bare, acting)
    assert torch.equal(model.unload()(x()), bare)
    assert all(torch.equal(base[name], tensor) for name, tensor in values(model).items() if name in base)


def test_an_adapter_added_while_all_are_disabled() -> None:
    model = adapted()
    with model.disable_adapter():
        bare = model(x())
        model.add_adapter("other", narrow(target_modules=["first", "second", "head"]))
        assert torch.equal(model(x()), bare)
        model.set_adapter("other")
        assert torch.equal(model(x()), bare)
    assert not torch.equal(model(x()), bare)
    assert model.active_adapters == ["other"]


def test_input_by_keyword() -> None:
    model = adapted()
    layer = model.get_base_model().first
    assert torch.equal(model(x=x()), model(x()))
    assert torch.equal(layer(input=x()), layer(x())), "torch's layers call it so"
    assert torch.equal(layer(x=x()), layer(x())), "transformers' do"
    with model.disable_adapter():
        assert torch.equal(layer(input=x()), layer(x()))


# loading --------------------------------------------------------------------------------------------------------------


def saved(folder: Path, r: int = 2) -> PeftModel:
    """Another model, whose adapter lies in the folder."""
    model = adapted(narrow(r=r))
    train(model)
    model.save_pretrained(folder)
    return model


def stored(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.adapter_tensors(adapter).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_loading_over_an_adapter_keeps_its_parameters(tmp_path: Path, active: bool) -> None:
    other = saved(tmp_path)
    model = adapted(more=narrow())
    if not active:
        model.set_adapter("more")
    before, trains = dict(model.named_parameters()), trained(model)
    report = model.load_adapter(tmp_path, "default", is_trainable=True)
    after = dict(model.named_parameters())
    assert report.is_clean
    assert list(before) == list(after)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert same(stored(model, "default"), stored(other, "default"))
    assert trained(model) == trains


@pytest.mark.parametrize("r", [2, 3], ids=["in place", "replaced"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_loading_over_an_adapter_leaves_it_as_trainable_as_it_was(tmp_path: Path, frozen: bool, r: int) -> None:
    saved(tmp_path, r=r)
    model = adapted()
    model.set_adapter("default", inference_mode=frozen)
    model.load_adapter(tmp_path, "default")
    assert bool(trained(model)) is not frozen


def test_loading_over_an_adapter_of_another_rank_replaces_it(tmp_path: Path) -> None:
    other = saved(tmp_path, r=3)
    model = adapted(more=narrow())
    untouched = stored(model, "more")
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert same(stored(model, "default"), stored(other, "default"))
    assert same(stored(model, "more"), untouched)
    assert model.peft_config["default"].r == 3
    assert (model.active_adapters, sorted(trained(model))) == (["default"], sorted(factors("default")))
    model.set_adapter(["default"])
    with torch.no_grad():
        model.get_base_model().load_state_dict(other.get_base_model().state_dict(), strict=False)
    assert torch.equal(model(x()), other(x()))


def test_a_loaded_adapter_is_frozen_unless_it_is_to_train(tmp_path: Path) -> None:
    saved(tmp_path)
    assert trained(PeftModel.from_pretrained(Net(), tmp_path)) == []
    assert sorted(trained(PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True))) == sorted(factors("default"))


# what is put back -----------------------------------------------------------------------------------------------------


def objects(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())


@pytest.mark.parametrize(
    "leave", [PeftModel.unload, lambda model: model.delete_adapter("default")], ids=["unload", "delete"]
)
@pytest.mark.parametrize("bias", ["none", "all", "narrow_only"])
def test_base_tensors_come_back(leave: Callable[[PeftModel], object], bias: str) -> None:
    base = Net()
    before, modules, parameters = values(base), objects(base), dict(base.named_parameters())
    model = get_peft_model(base, narrow(bias=bias, modules_to_save=["head"] if bias == "none" else None))
    biases = {"none": [], "all": ["first", "second", "head"], "narrow_only": ["first", "second"]}[bias]
    assert sum(name.endswith(".bias") for name in trained(model)) == (len(biases) or 1)
    train(model)
    leave(model)
    if base.first is not modules["first"]:  # deleting leaves empty wrappers
        assert trained(model) == []
        model.__dict__["peft_config"]["default"] = None
        base = model.get_base_model()
        model.session.unload()
    assert objects(base) == modules
    assert {name: p for name, p in base.named_parameters() if p is not parameters[name]} == {}
    assert same(values(base), before)
    assert trained(base) == []


def test_a_merged_model_keeps_its_trained_biases_and_modules() -> None:
    base = Net()
    model = get_peft_model(base, narrow(bias="narrow_only", modules_to_save=["head"]))
    head, twin = base.head.original_module, base.head.modules_to_save["default"]
    original = values(head)
    train(model)
    assert same(values(head), original), "the original was trained"
    assert not torch.equal(twin.weight, head.weight)
    wanted = model(x())
    merged = model.merge_and_unload()
    assert merged is base
    assert (merged.head, type(merged.first)) == (twin, nn.Linear)
    torch.testing.assert_close(merged(x()), wanted)


def test_the_original_of_a_module_to_save_acts_while_adapters_are_disabled() -> None:
    base = Net()
    bare = base(x())
    model = get_peft_model(base, narrow(modules_to_save=["head"]))
    train(model)
    with model.disable_adapter():
        assert torch.equal(model(x()), bare)
    assert torch.equal(model.unload()(x()), bare)


def test_unmerging_restores_every_bit() -> None:
    model = adapted()
    before, acting = values(model), model(x())
    model.merge_adapter()
    torch.testing.assert_close(model(x()), acting)
    assert not same(values(model), before)
    model.unmerge_adapter()
    assert same(values(model), before)
    assert torch.equal(model(x()), acting)


def test_merging_twice_changes_nothing_and_says_so() -> None:
    model = adapted()
    model.merge_adapter()
    once = values(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.merge_adapter()
    assert [w.message.diagnostic.code for w in told] == [rules.ALREADY_MERGED.code]
    assert told[0].filename == __file__, "the warning points at the caller"
    assert same(values(model), once)


# other ways in --------------------------------------------------------------------------------------------------------


def test_injecting_leaves_the_class_and_says_what_is_there() -> None:
    base = Net()
    config = narrow()
    assert inject_adapter_in_model(config, base) is base
    assert type(base) is Net
    assert list(base.peft_config) == ["default"]
    assert sorted(trained(base)) == sorted(factors("default"))
    inject_adapter_in_model(narrow(r=3), base, "other")
    assert list(base.peft_config) == ["default", "other"]
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    assert all(layer.active_adapters == ["other"] for layer in layers), "the second one is active, as in the reference"
    assert sorted(trained(base)) == sorted([*factors("default"), *factors("other")]), "the first one is left as it is"
    inject_adapter_in_model(narrow(r=3, inference_mode=True), base, "frozen")
    assert sorted(trained(base)) == sorted([*factors("default"), *factors("other")])
    for layer in layers:
        layer.set_adapter("other")
    assert sorted(trained(base)) == sorted(factors("other")), "who chooses by hand chooses for all of them"
    set_adapter(base, "default")
    assert sorted(trained(base)) == sorted(factors("default"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers has a newer name for it
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_that_was_on_before(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor | None]:
        base = LANGUAGE_MODEL.build()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.disable_input_require_grads()  # not every model, nor every version of transformers, switches it on
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = get_peft_model(base, narrow(target_modules="all-linear")).train()
        ids = LANGUAGE_MODEL.arguments()["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain
    assert list(plain) == list(checkpointed)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


APPLY = {"from_plan": PeftModel.from_plan, "apply_plan": apply_plan}


@pytest.mark.parametrize("apply", APPLY.values(), ids=APPLY)
def test_a_saved_plan_on_an_equal_model(apply: Callable[..., object]) -> None:
    plan = compile_plan(
        snapshot(Net()), {"default": narrow(modules_to_save=["head"]), "other": narrow(r=3)}, active=["other"]
    )
    model = Net()
    apply(model, plan_from_json(plan_to_json(plan)))
    found = {f"base_model.model.{name}": (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    wanted = {p.name: (p.shape, p.trainable) for p in plan.parameters()}
    assert {name: found.get(name) for name in wanted} == wanted
    assert sorted(trained(model)) == sorted(factors("other"))


@pytest.mark.parametrize("apply", APPLY.values(), ids=APPLY)
def test_a_saved_plan_on_a_model_that_drifted(apply: Callable[..., object]) -> None:
    plan = compile_plan(snapshot(Net()), {"default": narrow()})
    model = Net(width=7)
    before, modules = values(model), objects(model)
    with pytest.raises(PeftcError) as caught:
        apply(model, plan_from_json(plan_to_json(plan)))
    assert {d.code for d in caught.value.diagnostics} == {rules.PLAN_DRIFTED.code}
    told = str(caught.value)
    assert "`first` maps 7→7, not 8→8" in told
    assert "`second` maps 7→6, not 8→6" in told
    assert (objects(model), len(trained(model))) == (modules, 6)
    assert same(values(model), before)
