"""Shared slots: one tensor for several layers, counted and saved once, whole whatever is deleted. Derived slots: frozen
buffers that are computed again where they are not saved, and touch no global generator."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc import (
    PeftcError,
    PeftModel,
    compile_plan,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peftc.compiler import compile as compiling
from peftc.compiler.plan.cost import cost_of, file_bytes
from peftc.compiler.plan.serial import plan_from_text, plan_to_text
from peftc.model.functions.hotswap import hotswap_adapter
from peftc.runtime.applying.apply import session_of
from peftc.runtime.applying.planning import plan_for
from peftc.runtime.applying.snapshot import snapshot
from tests.defects import put_defect
from tests.runtime.methods import Net, x
from tests.runtime.shared import METHODS, CommonConfig, Tied, common, twin
from tests.unit.fakes import registered

BANK, PROJECTION = "common_B.default", "common_A.default"
IDS = torch.arange(7)


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with registered(*METHODS):
        yield


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def holders(model: nn.Module, slot: str, adapter: str = "default") -> list[Tensor]:
    """The tensor of a slot under each of its names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [tensor for name, tensor in named if name.endswith(f"{slot}.{adapter}")]


def one(tensors: list[Tensor]) -> bool:
    return len({id(tensor) for tensor in tensors}) == 1


def test_one_tensor_has_the_size_that_the_largest_layer_needs_and_shows_on_layers_and_at_the_top(net: Net) -> None:
    model = get_peft_model(net, common())
    for slot, shape in (("common_B", (8, 2)), ("common_A", (2, 8))):
        found = holders(model, slot)
        assert len(found) == 3 and one(found)
        assert found[0].shape == shape
    assert model.base_model.common_B["default"] is model.first.common_B["default"]
    assert "default" in model.base_model.common_A and not isinstance(model.base_model.common_A["default"], nn.Parameter)
    assert [*model.base_model.common_A] == ["default"] and len(model.base_model.common_A) == 1


@pytest.mark.parametrize("config", [common(), common(saves=False)], ids=["saved", "not saved"])
def test_the_plan_lists_a_shared_tensor_once_under_the_name_that_torch_gives_it(net: Net, config: CommonConfig) -> None:
    old = {name for name, _ in net.named_parameters()}
    plan = plan_for(net, {"default": config})
    adapter = plan.adapters[0]
    planned = {p.name: p for p in adapter.parameters()}
    model = get_peft_model(net, config)
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert planned.keys() == live.keys() and old
    assert [p.name for p in adapter.buffers()] == [name for name, _ in model.named_buffers()]
    held = [*live.values(), *model.buffers()]
    assert cost_of(plan).adapters == sum(tensor.numel() * tensor.element_size() for tensor in held)
    bank = planned["base_model.model.first.common_B.default"]
    assert bank.aliases == ("base_model.model.second.common_B.default", "base_model.common_B.default")
    assert bank.disk == "base_model.common_B"
    assert plan.counts() == model.get_nb_trainable_parameters() == (2 + 2 + 16, plan.base_numel + 20)
    assert model.get_model_status().trainable_params == 20


def test_a_plan_with_shared_slots_is_written_and_read_without_loss(net: Net) -> None:
    plan = plan_for(net, {"default": common(), "other": common(saves=False)})
    again = plan_from_text(plan_to_text(plan))
    assert again.adapters == plan.adapters
    assert list(again.parameters()) == list(plan.parameters())


@pytest.mark.parametrize("saves", [True, False])
def test_it_is_saved_once_and_loaded_into_one(net: Net, saves: bool, tmp_path: Path) -> None:
    model = get_peft_model(net, common(saves=saves))
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    own = {f"base_model.model.{layer}.common_d" for layer in ("first", "second")}
    assert file.keys() == own | {"base_model.common_B"} | ({"base_model.common_A"} if saves else set())
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    session = model.session
    assert file_bytes(session.plans["default"], session.graph.model) == size
    fresh = PeftModel.from_pretrained(unadapted(net), tmp_path)
    assert one(holders(fresh, "common_B")) and one(holders(fresh, "common_A"))
    assert torch.equal(fresh(x()), model(x()))
    assert not fresh.base_model.common_B["default"].requires_grad


def unadapted(net: Net) -> Net:
    """A model of the same weights without adapters."""
    clean = Net()
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    for name, module in clean.named_children():
        assert isinstance(module, nn.Linear)
        found = layers.get(f"{name}.base_layer") or layers[name]
        module.load_state_dict(found.state_dict())
    return clean


def test_what_was_not_saved_is_derived_again_without_the_global_generator(net: Net) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plan = plan_for(net, {"default": common(seed=3, saves=False)})
    values = {p.disk: torch.ones(p.shape) for p in plan.adapters[0].parameters()}
    model = PeftModel.from_plan(net, plan, {"default": values.get})
    assert torch.equal(torch.get_rng_state(), before)
    expected = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.base_model.common_A["default"], expected)


def test_a_saved_one_that_the_file_lacks_is_derived_with_a_warning(net: Net, tmp_path: Path) -> None:
    model = get_peft_model(net, common(seed=3))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.common_A"]
    save_file(tensors, file)
    with pytest.warns(match="PC6"):
        again = PeftModel.from_pretrained(unadapted(net), tmp_path)
    assert torch.equal(again(x()), model(x()))


def test_on_the_meta_device_derived_tensors_have_values_and_the_rest_is_assigned(net: Net) -> None:
    model = get_peft_model(net, common())
    state = get_peft_model_state_dict(model)
    hollow = get_peft_model(unadapted(net), common(), low_cpu_mem_usage=True)
    assert hollow.base_model.common_B["default"].is_meta and not hollow.base_model.common_A["default"].is_meta
    set_peft_model_state_dict(hollow, state, low_cpu_mem_usage=True)
    assert one(holders(hollow, "common_B")) and one(holders(hollow, "common_A"))
    assert torch.equal(hollow(x()), model(x()))
    with torch.device("meta"):
        bare = Net()
    empty = get_peft_model(bare, common())
    assert not empty.base_model.common_A["default"].is_meta


def test_a_state_dict_put_in_fills_it_once(net: Net) -> None:
    model = get_peft_model(net, common())
    state = {key: tensor + 1 for key, tensor in get_peft_model_state_dict(model).items()}
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys and not result.missing_keys
    assert torch.equal(model.base_model.common_B["default"], state["base_model.common_B"])
    live = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    assert torch.equal(get_peft_model_state_dict(model, live)["base_model.common_B"], state["base_model.common_B"] + 1)


def test_adapters_are_deleted_without_harm_to_others_and_layers_without_harm_to_the_adapter(net: Net) -> None:
    model = get_peft_model(net, common())
    model.add_adapter("other", common(target_modules=["second", "head"]))
    model.set_adapter("other")
    expected = model(x())
    model.delete_adapter("default")
    assert torch.equal(model(x()), expected)
    assert holders(model, "common_B") == [] and holders(model, "common_A") == []
    model.second.delete_adapter("other")
    bank = model.base_model.common_B["other"]
    assert model.head.common_B["other"] is bank and "base_model.common_B" in get_peft_model_state_dict(
        model, adapter_name="other"
    )
    model.head.delete_adapter("other")
    assert "other" not in model.base_model.common_B


def test_a_failed_adapter_leaves_nothing(net: Net) -> None:
    before = {name: id(p) for name, p in net.state_dict(keep_vars=True).items()}
    with pytest.raises(PeftcError, match=r"PC\d+.*`derive` of COMMON"):
        get_peft_model(net, common(bad=True))
    assert {name: id(p) for name, p in net.state_dict(keep_vars=True).items()} == before
    assert session_of(net) is None
    model = get_peft_model(net, common())
    names = set(model.state_dict())
    with pytest.raises(PeftcError):
        model.add_adapter("bad", common(bad=True, target_modules=["head", "first"]))
    assert set(model.state_dict()) == names
    assert "bad" not in model.base_model.common_B


def test_copies_pickles_and_casts_keep_it_one(net: Net) -> None:
    model = get_peft_model(net, common())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        for slot in ("common_A", "common_B"):
            found = holders(other, slot)
            assert one(found) and found[0] is not holders(model, slot)[0]
        assert torch.equal(other(x()), model(x()))
        other.double()
        assert one(holders(other, "common_A")) and other.first.common_A["default"].dtype == torch.float64
        other.delete_adapter("default")
        assert holders(other, "common_B") == []


def test_merging_unloading_and_saving_again(net: Net) -> None:
    clean, model = unadapted(net), get_peft_model(net, common())
    expected = model(x())
    model.merge_adapter()
    assert torch.allclose(model(x()), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x()), expected)
    level = model.base_model
    base = model.unload()
    assert torch.equal(base(x()), clean(x())) and list(level._modules) == ["model"]
    assert not any("common" in name for name in base.state_dict())


def test_a_model_adapted_in_place_has_it_on_its_layers_and_saves_it_under_the_same_key(net: Net) -> None:
    model = inject_adapter_in_model(common(), net)
    found = holders(model, "common_B")
    assert len(found) == 2 and one(found)
    state = get_peft_model_state_dict(model)
    assert state.keys() == {"first.common_d", "second.common_d", "base_model.common_B", "base_model.common_A"}
    other = inject_adapter_in_model(common(), unadapted(net))
    assert not set_peft_model_state_dict(other, state).unexpected_keys
    assert torch.equal(other(x()), model(x()))


def test_hotswap_replaces_it_once_and_derives_what_the_file_does_not_have(net: Net, tmp_path: Path) -> None:
    source = get_peft_model(unadapted(net), common(saves=False))
    source.save_pretrained(tmp_path)
    model = get_peft_model(net, common(saves=False))
    bank = model.base_model.common_B["default"]
    hotswap_adapter(model, tmp_path, "default")
    assert model.base_model.common_B["default"] is bank and one(holders(model, "common_B"))
    assert torch.equal(model(x()), source(x()))


def test_it_trains_as_one(net: Net) -> None:
    model = get_peft_model(net, common())
    bank = model.base_model.common_B["default"]
    model(x()).sum().backward()
    both = bank.grad.clone()
    with torch.no_grad():
        alone = copy.deepcopy(model)
    alone.zero_grad()
    alone.second.enable_adapters(False)
    alone(x()).sum().backward()
    assert not torch.allclose(both, alone.base_model.common_B["default"].grad)
    assert not model.base_model.common_A["default"].requires_grad


def test_tied_weights_share_under_the_first_name_and_untied_ones_do_not() -> None:
    model = get_peft_model(Tied(), twin())
    table, head = model.table.twin_delta["default"], model.head.twin_delta["default"]
    assert table is head
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.model.table.twin_delta.default"]
    assert model.get_nb_trainable_parameters()[0] == 7
    assert next(iter(get_peft_model_state_dict(model))) == "base_model.model.table.twin_delta"
    logits = model(IDS)
    model.table.delete_adapter("default")
    assert model.head.twin_delta["default"] is head and not torch.equal(model(IDS), logits)
    apart = get_peft_model(Tied(is_tied=False), twin())
    assert apart.table.twin_delta["default"] is not apart.head.twin_delta["default"]
    assert len([k for k in get_peft_model_state_dict(apart) if "twin" in k]) == 2


def test_tied_slots_load_and_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Tied()
    clean = copy.deepcopy(base)
    model = get_peft_model(base, twin())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(clean, tmp_path)
    for other in (again, copy.deepcopy(model)):
        assert other.table.twin_delta["default"] is other.head.twin_delta["default"]
        assert torch.equal(other(IDS), model(IDS))
    hollow = get_peft_model(Tied(), twin(), low_cpu_mem_usage=True)
    set_peft_model_state_dict(hollow, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert hollow.table.twin_delta["default"] is hollow.head.twin_delta["default"]
    assert not hollow.table.twin_delta["default"].is_meta


def test_options_that_all_adapters_must_have_alike(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(net, common())
    names = set(model.state_dict())
    with pytest.raises(PeftcError, match=r"(?s)PC431.*`seed` is `1` for `other` and `0` for `default`"):
        model.add_adapter("other", common(seed=1))
    assert set(model.state_dict()) == names
    with pytest.raises(PeftcError, match="PC431"):
        compile_plan(snapshot(Net()), {"a": common(), "b": common(seed=1)})
    put_defect(monkeypatch, compiling, "            if own != others:", "            if False:")
    model.add_adapter("other", common(seed=1))


def test_a_key_of_the_methods_own_shares_and_shapes_must_agree() -> None:
    model = get_peft_model(Tied(is_tied=False), twin(share="rows"))
    assert model.table.twin_delta["default"] is model.head.twin_delta["default"]
    with pytest.raises(PeftcError, match=r"`twin_delta` is \[7\] on `table` and \[4\] on `middle`"):
        get_peft_model(Tied(), twin(share="rows", target_modules=["table", "middle"]))
