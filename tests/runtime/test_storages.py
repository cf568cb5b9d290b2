"""Layers whose weight a storage packs: each adapter does on them what it does on plain layers of the same numbers, in each state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peftc import PeftcError, PeftConfig, PeftcWarning, PeftModel, dequantize, get_peft_model, rules
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.graph.files import graph_from_text, write_graph
from peftc.graph.nodes import Kind
from peftc.plugin import hookimpl, register_storage, unregister_storage
from peftc.registry.storages import default_storages
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.bases import packed as backend
from peftc.runtime.bases import places, storages, table
from peftc.testing.models import seeded
from tests.defects import put_defect
from tests.runtime.methods import Net, narrow, stretch, x
from tests.runtime.storages import LARGEST, Rounded, RoundedStorage, Sealed, opened, packed

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.filterwarnings("ignore:.*PC567")
CONFIGS = {"thin": narrow, "output": stretch}


@pytest.fixture(autouse=True)
def _storage() -> Iterator[None]:
    table._packed.cache_clear()
    register_storage(RoundedStorage())
    yield
    default_storages().forget("rounded")
    table._packed.cache_clear()


def net() -> nn.Module:
    with seeded(0):
        return packed(Net())


def pair(config: PeftConfig) -> tuple[PeftModel, PeftModel]:
    """The adapter on packed layers, and on plain ones of the same numbers; its tensors are drawn."""
    first, second = get_peft_model(net(), copy.deepcopy(config)), get_peft_model(opened(net()), config)
    state = {name: torch.randn_like(t) * 0.3 for name, t in first.named_parameters() if t.requires_grad}
    for model in (first, second):
        model.load_state_dict(state, strict=False)
    return first, second


def test_the_graph_has_the_layers_as_linear_ones_with_how_they_are_stored(tmp_path: Path) -> None:
    graph = snapshot(net())
    facts = graph.by_path["second"].facts
    assert facts.kind is Kind.LINEAR and (facts.in_features, facts.out_features) == (8, 6)
    assert facts.packed is not None and facts.packed.storage == "rounded"
    assert facts.nbytes == 6 * 8 + 6 * 4 + 6 * 4 and facts.numel == 6 * 8 + 6
    assert graph.nbytes == sum(node.facts.nbytes for node in graph.nodes)
    write_graph(graph, tmp_path / "graph.json")
    again = graph_from_text((tmp_path / "graph.json").read_text())
    assert again.by_path["second"].facts == facts and again.digest == graph.digest


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_training_is_that_of_plain_layers(name: str) -> None:
    first, second = pair(CONFIGS[name]())
    inputs = x()
    grads = []
    for model in (first.train(), second.train()):
        own = inputs.clone().requires_grad_()
        model(own).square().sum().backward()
        grads.append([own.grad, *(t.grad for _, t in sorted(model.named_parameters()) if t.requires_grad)])
    assert len(grads[0]) == len(grads[1]) > 1
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_the_weight_is_packed_anew_and_comes_back_bit_for_bit(name: str) -> None:
    first, second = pair(CONFIGS[name]())
    layer = first.base_model.model.first.get_base_layer()
    before, numbers = (layer.codes, layer.scale, layer.tag), layer.numbers()
    first.eval(), second.eval()
    plain, y = second(x()), first(x())
    torch.testing.assert_close(y, plain)
    first.merge_adapter()
    assert layer.codes is not before[0] and layer.scale is not before[1]
    second.merge_adapter()
    wanted, got = second.base_model.model.first.get_base_layer().weight, layer.numbers()
    assert (got - wanted).abs().max() <= wanted.abs().max() / LARGEST / 2 * 1.001
    assert torch.allclose(first(x()), y, atol=0.2)
    assert torch.equal(first.base_model.model.first.pristine()["weight"], numbers)
    assert torch.equal(layer.numbers(), got)
    with first.disable_adapter():
        assert layer.codes is before[0] and layer.scale is before[1] and layer.tag == before[2]
    assert layer.codes is not before[0]
    first.unmerge_adapter()
    assert layer.codes is before[0] and layer.scale is before[1] and layer.tag == before[2]
    assert torch.equal(first(x()), y)


def test_copies_and_files_do_the_same(tmp_path: Path) -> None:
    first, _ = pair(narrow())
    y = first.eval()(x())
    for model in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(model(x()), y)
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model(x()), y)
    first.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), str(tmp_path)).eval()(x()), y)
    first.merge_adapter()
    copied = copy.deepcopy(first)
    copied.unmerge_adapter()
    assert torch.equal(copied(x()), y)


def test_unloaded_and_merged_the_layers_stay_packed() -> None:
    first, _ = pair(narrow())
    y = first.eval()(x())
    merged = first.merge_and_unload()
    assert isinstance(merged.first, Rounded) and torch.allclose(merged.train()(x()), y, atol=0.2)


def test_rows_of_a_batch_have_adapters_of_their_own() -> None:
    first, second = pair(narrow())
    for model in (first, second):
        with seeded(1):
            model.add_adapter("other", narrow(r=3))
        model.set_adapter("default")
        model.eval()
    names = ["default", "__base__", "other"]
    rows = torch.randn(3, 8)
    torch.testing.assert_close(first(rows, adapter_names=names), second(rows, adapter_names=names))


def test_a_setting_is_there_while_adapters_are() -> None:
    first, _ = pair(narrow())
    assert not any(module.drifts for module in first.modules() if isinstance(module, Rounded))


class Opening(RoundedStorage):
    """A storage whose library would open a model's weights before its first call"""

    openers = (f"{__name__}.opens",)


def opens(model: nn.Module, args: object) -> None:
    raise AssertionError("the weights are open now")


def other(model: nn.Module, args: object) -> None:
    """Somebody else's hook."""


def with_hooks(model: nn.Module) -> nn.Module:
    for hook in (other, opens):
        model.register_forward_pre_hook(hook)
    return model


def test_what_would_open_the_weights_is_taken_off_the_model_and_is_back_if_nothing_comes_of_it() -> None:
    default_storages().forget("rounded")
    table._packed.cache_clear()
    register_storage(Opening())
    model = with_hooks(net())
    with pytest.raises(PeftcError):
        get_peft_model(model, narrow(begin="late", r=2))
    assert list(model._forward_pre_hooks.values()) == [other, opens]
    tuned = get_peft_model(model, narrow())
    assert list(model._forward_pre_hooks.values()) == [other]
    tuned(x())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bias_in_a_buffer_is_as_one_in_a_parameter(name: str) -> None:
    first, second = pair(CONFIGS[name]())
    layer, plain = (model.base_model.model.first.get_base_layer() for model in (first.eval(), second.eval()))
    layer.register_buffer("bias", layer._parameters.pop("bias").data)
    before = layer.bias
    first.merge_adapter(), second.merge_adapter()
    torch.testing.assert_close(layer.bias, plain.bias.detach())
    assert "bias" in layer._buffers and "bias" not in layer._parameters
    first.unmerge_adapter()
    assert layer.bias is before


def test_a_storage_that_takes_no_other_weight_refuses_merging_and_changes_nothing() -> None:
    default_storages().forget("rounded")
    table._packed.cache_clear()
    register_storage(Sealed())
    first, _ = pair(narrow())
    y = first.eval()(x())
    with pytest.raises(PeftcError, match="its rows are counted") as caught:
        first.merge_adapter()
    assert caught.value.diagnostics[0].code == rules.PACKED_FOR_GOOD.code
    assert torch.equal(first(x()), y) and not first.base_model.model.first.merged


def test_a_storage_that_is_not_there_any_more_is_named() -> None:
    with pytest.raises(PeftcError) as caught:
        unregister_storage("rounder")
    assert caught.value.diagnostics[0].code == rules.STORAGE_UNKNOWN.code
    assert "rounded" in caught.value.diagnostics[0].fix


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "Rounded"}, "lower case"),
        ({"name": ""}, "lower case"),
        ({"held": "codes"}, "tuple of texts"),
        ({"classes": ()}, "which layers"),
        ({"pack": RoundedStorage.__mro__[1].pack}, "gives no `pack`"),
    ],
)
def test_a_record_that_breaks_the_contract_is_refused(change: dict[str, Any], word: str) -> None:
    wrong = type("Wrong", (RoundedStorage,), {"name": "wrong", **change})
    with pytest.raises(PeftcError, match=word):
        register_storage(wrong())


def test_a_hook_that_gives_something_else_is_refused() -> None:
    module = SimpleNamespace(peftc_storage=hookimpl(lambda: 1), __name__="wrong")
    with pytest.raises(PeftcError, match="not a `Storage`"):
        default_storages().register(module)


@pytest.mark.parametrize("function", ["facts", "open", "pack", "settings"])
def test_what_a_storage_raises_names_it(function: str) -> None:
    def broken(self: Any, *args: Any) -> Any:
        raise ZeroDivisionError("by me")

    default_storages().forget("rounded")
    table._packed.cache_clear()
    register_storage(type("Broken", (RoundedStorage,), {function: broken})())
    with pytest.raises(PeftcError, match="rounded") as caught:
        model = get_peft_model(net(), narrow())
        model.merge_adapter()
    assert function in str(caught.value) and "by me" in str(caught.value)


def test_a_packed_layer_cannot_be_trained_whole() -> None:
    with pytest.raises(PeftcError, match="rounded") as caught:
        get_peft_model(net(), narrow(target_modules=["first"], modules_to_save=["head"]))
    assert caught.value.diagnostics[0].code == rules.CANNOT_SAVE.code


def test_packed_weights_count_as_many_as_they_have_opened() -> None:
    config = narrow()
    assert (
        get_peft_model(net(), config).get_nb_trainable_parameters()
        == get_peft_model(opened(net()), config).get_nb_trainable_parameters()
    )


def test_a_start_that_changes_the_base_weight_is_refused() -> None:
    with pytest.raises(PeftcError) as caught:
        get_peft_model(net(), narrow(begin="late", r=2))
    assert caught.value.diagnostics[0].code == rules.START_UNFIT.code


def test_what_rounding_costs_is_told_once_for_a_merge() -> None:
    first, second = pair(narrow())
    first.eval(), second.eval()
    with pytest.warns(PeftcWarning, match=rules.MERGE_ROUNDED.code) as caught:
        first.merge_adapter()
    assert len(caught) == 1 and "2 layers stored by rounded" in str(caught[0].message)
    second.merge_adapter()
    worst = 0.0
    for name in ("first", "second"):
        wanted = getattr(second.base_model.model, name).get_base_layer().weight
        was = getattr(opened(net()), name).weight
        got = getattr(first.base_model.model, name).get_base_layer().numbers()
        worst = max(worst, ((got - wanted).norm() / (wanted - was).norm()).item())
    assert f"{worst:.0%} in the worst" in str(caught[0].message)


def test_made_plain_the_layers_have_the_same_numbers_and_adapters_merge_exactly(tmp_path: Path) -> None:
    first, second = pair(narrow())
    first.save_pretrained(tmp_path)
    base = net()
    y, shared = base.train()(x()), base.second
    base.again = shared
    plain = dequantize(base)
    assert plain is base and plain.again is plain.second and plain.training
    assert all(type(module) is not Rounded for module in plain.modules())
    assert not any(p.requires_grad for p in plain.parameters()) and torch.equal(plain(x()), y)
    assert dequantize(net(), torch.bfloat16).first.weight.dtype is torch.bfloat16
    del plain.again
    model = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    torch.testing.assert_close(model.merge_and_unload()(x()), second.eval()(x()))


def test_with_adapters_on_it_a_model_is_not_made_plain() -> None:
    model = get_peft_model(net(), narrow())
    with pytest.raises(PeftcError) as caught:
        dequantize(model.get_base_model())
    assert caught.value.diagnostics[0].code == rules.WHILE_ADAPTED.code
    assert isinstance(model.base_model.model.first.get_base_layer(), Rounded)


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        (backend, "self._storage.open(base).detach()", "self._storage.open(base).detach() * 1.5"),
        (backend, "change(base, kept)", "pass"),
        (backend, "change(base, now)", "pass"),
        (
            places,
            "for own in _held(module) if name in own), module._parameters)[name] = value",
            "for own in ()), module._parameters)[name] = value",
        ),
        (storages, "own[name] = value", "pass"),
    ],
)
def test_these_tests_find_defects(monkeypatch: Patch, module: Any, before: str, after: str) -> None:
    put_defect(monkeypatch, module, before, after)
    with pytest.raises((AssertionError, PeftcError, RuntimeError, TypeError)):
        test_merged_the_weight_is_packed_anew_and_comes_back_bit_for_bit("thin")


def test_a_plan_says_that_a_start_changes_a_packed_weight() -> None:
    with pytest.raises(
        PeftcError, match=r"`begin: late` changes the weight of `first`, which is packed \(rounded\)"
    ) as caught:
        compile_plan(snapshot(net()), {"default": narrow(begin="late", r=2)})
    assert {problem.code for problem in caught.value.diagnostics} == {rules.START_UNFIT.code}


def test_a_plan_on_packed_layers_comes_back_from_its_file() -> None:
    plan = compile_plan(snapshot(net()), {"default": narrow()})
    assert plan_from_json(plan_to_json(plan)) == plan


def test_the_status_names_how_layers_are_stored(monkeypatch: Patch) -> None:
    first, second = pair(narrow())
    assert {layer.quantization_backend for layer in first.get_layer_status()} == {"rounded"}
    assert (first.get_model_status().quantization_backend, second.get_model_status().quantization_backend) == (
        "rounded",
        None,
    )
    monkeypatch.setattr(RoundedStorage, "known_as", "in rows")
    assert first.get_model_status().quantization_backend == "in rows"
