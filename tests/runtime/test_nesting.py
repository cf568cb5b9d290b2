"""Several methods on one model: a wrapper is one more kind of base, and the order of mixing is the order of nesting."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftc import (
    PeftcError,
    PeftMixedModel,
    PeftModel,
    compile_plan,
    get_peft_model,
    inject_adapter_in_model,
    rules,
)
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.plugin import LINEAR_KINDS, LayerFacts, MapTuner, Slot, View, parameter_slot
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.layer.wrapper import TunerLayer
from tests.runtime.methods import NarrowConfig, Net, StretchConfig, adapted, narrow, stretch, x
from tests.unit.fakes import plugin


def mixed(*active: str) -> PeftModel:
    """On `first`: a narrow update, a stretch round it, and a narrow update round both; on `second` the narrow ones."""
    torch.manual_seed(1)
    model = get_peft_model(Net(), narrow(), "inner", mixed=True)
    model.add_adapter("middle", stretch())
    model.add_adapter("outer", narrow(r=3))
    model.set_adapter(list(active) or ["inner", "middle", "outer"])
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def expected(model: PeftModel, layer: TunerLayer, names: Iterable[str], rows: Tensor) -> Tensor:
    """What the wrappers of one layer come to, by their formulae."""
    y = layer.get_base_layer()(rows)
    for wrapper in layer.chain():
        for name in (n for n in wrapper.adapters if n in names):
            if "narrow_A" in wrapper._modules:
                A, B = wrapper.narrow_A[name].weight, wrapper.narrow_B[name].weight
                y = y + rows @ A.T @ B.T / 2
            else:
                y = y * wrapper.stretch_l[name]
    return y


@pytest.mark.parametrize("active", [("inner",), ("middle",), ("outer", "inner"), ("inner", "middle"), ()])
def test_adapters_act_in_the_order_of_nesting(active: tuple[str, ...]) -> None:
    model = mixed(*active)
    layer = model.get_base_model().first
    names = active or ("inner", "middle", "outer")
    torch.testing.assert_close(layer(x()), expected(model, layer, names, x()))
    assert model.active_adapters == list(names)


def test_exactly_the_active_ones_train_and_all_of_them_get_gradients() -> None:
    model = mixed("middle", "outer")
    trained = {name.split(".")[-2] if "narrow" in name else name.split(".")[-1] for name, p in named(model)}
    assert trained == {"middle", "outer"}
    model(x()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in named(model))


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_the_plan_names_every_parameter() -> None:
    configs = {"inner": narrow(), "middle": stretch(), "outer": narrow(r=3, modules_to_save=["head"])}
    plan = compile_plan(snapshot(Net()), configs, active=["middle", "outer"], mixed=True)
    base = {f"base_model.model.{name}" for name, _ in Net().named_parameters()}
    for applied in (plan, plan_from_json(plan_to_json(plan))):
        model = PeftMixedModel.from_plan(Net(), applied)
        found = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
        planned = {p.name: (p.shape, p.trainable) for p in plan.parameters()}
        assert {name: found.get(name) for name in planned} == planned
        rest = {
            name.replace(".base_layer", "").replace(".original_module", "") for name in found if name not in planned
        }
        assert rest == base
    assert plan.counts() == model.get_nb_trainable_parameters()
    assert "base_model.model.first.base_layer.base_layer.narrow_A.inner.weight" in planned
    assert "base_model.model.first.base_layer.stretch_l.middle" in planned
    assert "base_model.model.second.narrow_A.inner.weight" in planned


def test_merging_unmerging_and_unloading() -> None:
    model = mixed()
    base, before, acting = Net(), values(model), model(x())
    bare = model.unload().state_dict()
    model = mixed()
    model.merge_adapter()
    assert model.session.merged == ("inner", "middle", "outer")
    torch.testing.assert_close(model(x()), acting)
    model.unmerge_adapter()
    assert same(values(model), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x()), acting)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert list(bare) == list(base.state_dict())


def test_some_are_merged_and_the_others_go_on_acting() -> None:
    model = mixed()
    before, acting = values(model), model(x())
    model.merge_adapter(["inner"])
    torch.testing.assert_close(model(x()), acting)
    model.merge_adapter(["middle"])
    torch.testing.assert_close(model(x()), acting)
    with pytest.raises(PeftcError):
        model.delete_adapter("middle")
    model.unmerge_adapter()
    assert same(values(model), before)


def test_a_sum_may_be_merged_before_another() -> None:
    model = mixed("inner", "outer")
    acting = model(x())
    model.merge_adapter(["outer"])
    torch.testing.assert_close(model(x()), acting)


@pytest.mark.filterwarnings("ignore::peftc.PeftcWarning")
def test_a_failed_merge_leaves_what_was_merged_before() -> None:
    model = mixed()
    model.merge_adapter(["inner"])
    merged, before = model.session.merged, values(model)
    with torch.no_grad():
        model.get_base_model().second.narrow_A["outer"].weight.fill_(torch.inf)
    with pytest.raises(PeftcError) as caught:
        model.merge_adapter(safe_merge=True)
    assert [d.code for d in caught.value.diagnostics][-1] == rules.MERGE_NOT_FINITE.code
    assert model.session.merged == merged
    after = values(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "narrow_A.outer" not in name)


def test_activating_others_takes_merged_ones_out_and_says_so() -> None:
    model = mixed("inner")
    model.set_adapter("outer")
    wanted = model(x())
    model.set_adapter("inner")
    model.merge_adapter()
    model.set_adapter("inner")
    assert model.session.merged == ("inner",), "nothing else was asked for"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.set_adapter("outer")
    assert [w.message.diagnostic.code for w in told] == [rules.WHILE_MERGED.code]
    assert told[0].filename == __file__
    assert torch.equal(model(x()), wanted)


def test_deleting_leaves_the_others() -> None:
    model = mixed()
    model.set_adapter(["inner", "outer"])
    wanted = model(x())
    model.delete_adapter("middle")
    assert torch.equal(model(x()), wanted)
    assert not [name for name, _ in model.named_parameters() if "middle" in name]
    assert list(model.peft_config) == list(model.base_model.peft_config) == ["inner", "outer"]
    model.add_adapter("again", stretch())
    model.set_adapter("again")
    model.delete_adapter("again")
    model.delete_adapter("inner")
    model.delete_adapter("outer")
    assert [type(m) for m in model.get_base_model().modules()].count(nn.Linear) == 3


def test_copies_are_whole() -> None:
    model = mixed()
    acting = model(x())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.get_base_model()))):
        assert torch.equal(twin(x()), acting)
        for parameter in model.parameters():
            assert all(parameter is not other for other in twin.parameters())
    twin = copy.deepcopy(model)
    twin.set_adapter("middle")
    assert model.active_adapters == ["inner", "middle", "outer"]
    assert torch.equal(model(x()), acting)


@pytest.mark.parametrize("name", ["inner", "middle", "outer"])
def test_each_is_saved_and_loaded_as_if_alone(name: str, tmp_path: Path) -> None:
    model = mixed(name)
    acting = model(x())
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(Net(), tmp_path / name)
    with torch.no_grad():
        alone.get_base_model().load_state_dict(
            {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()}, strict=False
        )
    for part in ("first", "second", "head"):
        base, mine = model.session.find(part), alone.session.find(part)
        mine.load_state_dict(base.state_dict())
    torch.testing.assert_close(alone(x()), acting)
    other = mixed()
    other.load_adapter(tmp_path / name, name)
    assert same(other.adapter_tensors(name), model.adapter_tensors(name))
    assert other.active_adapters == ["inner", "middle", "outer"]


def test_a_failing_addition_changes_nothing() -> None:
    model = mixed()
    modules, before, acting = dict(model.named_modules()), values(model), model(x())
    for bad in (narrow(target_modules=["first", "head"]), stretch(target_modules=["first", "head"])):
        method = default_registry().get(str(bad.peft_type))
        broken = type("Broken", (type(method.tuner),), {"init": _fail_on_the_head})()
        default_registry().register(plugin(replace(method, tuner=broken)), method.peft_type.lower())
        with pytest.raises(PeftcError):
            model.add_adapter("bad", bad)
        assert dict(model.named_modules()) == modules
        assert same(values(model), before)
    assert torch.equal(model(x()), acting)
    assert list(model.session.layers) == ["first", "second"]
    model.delete_adapter("outer")


def _fail_on_the_head(self: object, c: object, layer: LayerFacts, slots: Mapping[str, Tensor], init: object) -> None:
    if layer.out_features == 3:
        raise ArithmeticError
    for tensor in slots.values():
        tensor.zero_()


def test_an_ordinary_model_says_how_to_mix() -> None:
    with pytest.raises(PeftcError, match="mixed=True"):
        adapted().add_adapter("other", stretch())


def test_injecting_another_method_nests() -> None:
    model = Net()
    inject_adapter_in_model(narrow(), model, "inner")
    inject_adapter_in_model(stretch(), model, "outer")
    names = [name for name, _ in model.first.named_parameters()]
    assert names == [
        "base_layer.base_layer.weight",
        "base_layer.base_layer.bias",
        "base_layer.narrow_A.inner.weight",
        "base_layer.narrow_B.inner.weight",
        "stretch_l.outer",
    ]
    assert list(model.peft_config) == ["inner", "outer"]


class Turned(MapTuner[StretchConfig]):
    """Adds the pristine weight, turned round: a method that can only change parameters."""

    supports = LINEAR_KINDS

    def slots(self, c: StretchConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("stretch_l", (layer.out_features,))

    def init(self, c: StretchConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: object) -> None:
        slots["stretch_l"].fill_(0.5)

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**p, "weight": p["weight"] * a.stretch_l[:, None] + p0["weight"].flip(1)}


def test_a_method_on_parameters_sees_those_that_others_made() -> None:
    method = default_registry().get("STRETCH")
    default_registry().register(plugin(replace(method, tuner=Turned())), "stretch")
    model = mixed("inner", "middle")
    layer = model.get_base_model().first
    base, wrapper = layer.get_base_layer(), layer.base_layer.base_layer
    update = wrapper.narrow_B["inner"].weight @ wrapper.narrow_A["inner"].weight / 2
    weight = (base.weight + update) * 0.5 + base.weight.flip(1)
    torch.testing.assert_close(layer(x()), x() @ weight.T + base.bias)
    acting = model(x())
    model.merge_adapter()
    torch.testing.assert_close(model(x()), acting)
    with model.disable_adapter():
        model.unmerge_adapter()
        torch.testing.assert_close(layer(x()), base(x()))


def test_hooks_of_the_base_layer_see_its_own_output() -> None:
    model = mixed()
    layer = model.get_base_model().first
    seen: list[Tensor] = []
    layer.get_base_layer().register_forward_hook(lambda module, args, out: seen.append(out))
    layer(x())
    torch.testing.assert_close(seen[0], nn.functional.linear(x(), layer.weight, layer.bias))


def test_a_layer_told_otherwise_by_another_library() -> None:
    model = mixed("inner")
    for module in model.modules():
        if isinstance(module, TunerLayer):
            module.set_adapter("outer")
    assert model.active_adapters == ["outer"]
    assert {name.split(".")[-2] for name, _ in named(model)} == {"outer"}
    for module in model.modules():
        if isinstance(module, TunerLayer):
            module.delete_adapter("outer")
    assert model.active_adapters == ["inner"]
    model.set_adapter(["inner", "middle"])
    assert isinstance(model.peft_config["inner"], NarrowConfig)
    layer = model.get_base_model().first
    torch.testing.assert_close(layer(x()), expected(model, layer, ["inner", "middle"], x()))
