"""Merged models whose adapters are switched off: the base computes, bit for bit, and what was merged comes back as it was.

The kit holds the plain case for every method that merges (`disabled_is_base_while_merged`); here are other ways, and states.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, PeftModel, get_peft_model, inject_adapter_in_model, rules
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session import session, switched
from peftc.testing.compare import objects_of
from tests.defects import put_defect
from tests.runtime.methods import Net, adapted, narrow, stretch, x

BASE = ["__base__"] * 5


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained(model: PeftModel) -> PeftModel:
    """The model with everything that trains moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(0.1, 0.5, parameter.numel()).view(parameter.shape))
    return model.eval()


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def nested(*active: str) -> PeftModel:
    """A stretch round a narrow update round another stretch."""
    model = get_peft_model(net(), stretch(), "inner", mixed=True)
    model.add_adapter("middle", narrow())
    model.add_adapter("outer", stretch(target_modules=["first", "head"]))
    model.set_adapter(list(active or ("inner", "middle", "outer")))
    return trained(model)


def whole() -> PeftModel:
    """An adapter that trains a module whole and biases beside its layers."""
    return trained(get_peft_model(net(), narrow(bias="all", modules_to_save=["head"])))


def two() -> PeftModel:
    """Two active adapters."""
    model = get_peft_model(net(), narrow())
    model.add_adapter("other", narrow(target_modules=["second", "head"]))
    model.set_adapter(["default", "other"])
    return trained(model)


MODELS: dict[str, Callable[[], PeftModel]] = {"nested": nested, "whole": whole, "two": two}


# ways to switch off -----------------------------------------------------------------------------------------------------


@contextmanager
def by_level(model: PeftModel) -> Iterator[None]:
    model.base_model.disable_adapter_layers()  # type: ignore[operator]
    yield
    model.base_model.enable_adapter_layers()  # type: ignore[operator]


@contextmanager
def twice(model: PeftModel) -> Iterator[None]:
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        yield


WAYS: dict[str, Callable[[PeftModel], AbstractContextManager[None]]] = {
    "block": PeftModel.disable_adapter,
    "level": by_level,
    "nested blocks": twice,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_base_computes_and_the_merged_state_comes_back(kind: str, way: str) -> None:
    model, bare = MODELS[kind](), net()(x())
    unmerged = bits(model)
    model.merge_adapter()
    state, y, objects = bits(model), model(x()), objects_of(model)
    with WAYS[way](model):
        assert torch.equal(model(x()), bare)
    assert torch.equal(model(x()), y)
    assert same(bits(model), state)
    assert objects_of(model) == objects
    model.unmerge_adapter()
    assert same(bits(model), unmerged)


@pytest.mark.parametrize("kind", MODELS)
def test_biases_and_copies_are_the_bases_while_disabled(kind: str) -> None:
    model, bare = MODELS[kind](), net()(x())
    before = model.adapter_tensors(next(iter(model.peft_config)))
    y = model(x())
    with model.disable_adapter():
        assert torch.equal(model(x()), bare)
        assert torch.equal(model(x(), adapter_names=BASE), bare)
        assert same(model.adapter_tensors(next(iter(model.peft_config))), before), "what is saved is the adapter's"
    assert torch.equal(model(x()), y)


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_the_base_are_the_bases(kind: str) -> None:
    model, bare = MODELS[kind](), net()(x())
    model.merge_adapter()
    y = model(x())
    assert torch.equal(model(x(), adapter_names=BASE), bare)
    assert torch.equal(model(x()), y)
    with pytest.raises(PeftcError, match=rules.WHILE_MERGED.code):
        model(x(), adapter_names=[next(iter(model.peft_config)), *BASE[1:]])


def test_an_adapter_that_is_not_active_trains_no_biases_into_others() -> None:
    model, bare = trained(get_peft_model(net(), narrow(bias="all"))), net()(x())
    y = model(x())
    model.set_adapter([])
    assert torch.equal(model(x()), bare)
    model.set_adapter("default")
    assert torch.equal(model(x()), y)


# layer by layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True], ids=["outer first", "inner first"])
def test_of_nested_layers_in_any_order(turned: bool) -> None:
    """As transformers switches adapters off and on: module by module."""
    model, bare = nested(), net()(x())
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    layers = layers[::-1] if turned else layers
    model.merge_adapter()
    state = bits(model)
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(model(x()), bare)
    for layer in layers:
        layer.enable_adapters(True)
    assert same(bits(model), state)


@pytest.mark.parametrize("off", ["inner", "middle", "outer"])
def test_one_method_of_several_is_switched_off(off: str) -> None:
    """What it leaves is what the others do without it, wherever it lies."""
    model = nested()
    model.set_adapter([name for name in ("inner", "middle", "outer") if name != off])
    wanted = model(x())
    model.set_adapter(["inner", "middle", "outer"])
    model.merge_adapter()
    state = bits(model)
    holders = [m for m in model.modules() if isinstance(m, TunerLayer) and off in m.adapters]
    for layer in holders:
        layer.enable_adapters(False)
    torch.testing.assert_close(model(x()), wanted)
    for layer in holders:
        layer.enable_adapters(True)
    assert same(bits(model), state)


def test_a_model_adapted_in_place() -> None:
    model = net()
    bare = model(x())
    inject_adapter_in_model(narrow(), model)
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    for layer in layers:
        layer.merge()
    y = model(x())
    assert not torch.equal(y, bare)
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(model(x()), bare)
    for layer in layers:
        layer.enable_adapters(True)
    assert torch.equal(model(x()), y)


# what is done meanwhile -------------------------------------------------------------------------------------------------


def test_a_merged_adapter_that_is_not_active_is_switched_off_too() -> None:
    model, bare = two(), net()(x())
    model.set_adapter("default")
    model.merge_adapter(["other"])
    y = model(x())
    with model.disable_adapter():
        assert torch.equal(model(x()), bare)
    assert torch.equal(model(x()), y)


@pytest.mark.parametrize("names", [None, ["other"], ["default", "other"]], ids=str)
def test_merging_while_disabled_acts_once_enabled(names: list[str] | None) -> None:
    model, bare = two(), net()(x())
    model.set_adapter("default")
    twin = copy.deepcopy(model)
    twin.merge_adapter(names)
    with model.disable_adapter():
        model.merge_adapter(names)
        assert torch.equal(model(x()), bare)
    assert same(bits(model), bits(twin))
    assert torch.equal(model(x()), twin(x()))


def test_unmerging_while_disabled_leaves_the_adapters_beside() -> None:
    model, bare = nested(), net()(x())
    state, y = bits(model), model(x())
    model.merge_adapter()
    with model.disable_adapter():
        model.unmerge_adapter()
        assert torch.equal(model(x()), bare)
    assert same(bits(model), state)
    assert torch.equal(model(x()), y)


@pytest.mark.parametrize("kind", MODELS)
def test_a_disabled_model_is_merged_for_good_with_all_that_it_trained(kind: str) -> None:
    model, twin = MODELS[kind](), MODELS[kind]()
    wanted = twin.merge_and_unload()(x())
    model.base_model.disable_adapter_layers()  # type: ignore[operator]
    assert torch.equal(model.merge_and_unload()(x()), wanted)


def test_unloading_while_merged_and_disabled_restores_the_base() -> None:
    base = net()
    objects, state = objects_of(base), bits(base)
    model = trained(get_peft_model(base, narrow()))
    model.merge_adapter()
    model.base_model.disable_adapter_layers()  # type: ignore[operator]
    model.unload()
    assert objects_of(base) == objects
    assert same(bits(base), state)


def test_activating_others_while_disabled() -> None:
    model, bare = two(), net()(x())
    model.set_adapter("other")
    wanted = model(x())
    model.set_adapter("default")
    model.merge_adapter()
    with model.disable_adapter():
        with pytest.warns(UserWarning, match=rules.WHILE_MERGED.code):
            model.set_adapter("other")
        assert torch.equal(model(x()), bare)
    assert torch.equal(model(x()), wanted)


@pytest.mark.parametrize("cast", [lambda m: m.double(), lambda m: m.bfloat16()], ids=["double", "bfloat16"])
def test_casts_reach_what_is_set_aside(cast: Callable[[PeftModel], PeftModel]) -> None:
    model, plain = nested(), nested()
    model.merge_adapter()
    with model.disable_adapter():
        cast(model)
        dtype = model.get_base_model().first.weight.dtype
        assert torch.equal(model(x().to(dtype)), net().to(dtype)(x().to(dtype)))
    plain.merge_adapter()
    assert same(bits(model), bits(cast(plain)))


def test_a_copy_of_a_merged_and_disabled_model() -> None:
    model, bare = nested(), net()(x())
    model.merge_adapter()
    y = model(x())
    with model.disable_adapter():
        twin = copy.deepcopy(model)
    assert torch.equal(twin(x()), bare)
    twin.session.enable(True)
    assert torch.equal(twin(x()), y)
    twin.unmerge_adapter()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x()), y)


def test_inner_methods_that_are_merged_later_come_out_right() -> None:
    """An outer method that was merged alone is folded in anew over what is merged below it."""
    model = get_peft_model(net(), narrow(), "one", mixed=True)
    model.add_adapter("two", stretch())
    model.set_adapter(["two"])
    trained(model)
    model.merge_adapter(["two"])
    state = bits(model)
    model.session.layers["first"].chain()[0].merge(adapter_names=["one"])
    model.session.layers["first"].chain()[0].unmerge()
    assert same(bits(model), state)
    model.unmerge_adapter()
    assert torch.equal(model.get_base_model().first.get_base_layer().weight, net().first.weight)


# some layers only -------------------------------------------------------------------------------------------------------


def test_layers_that_are_disabled_already_are_told_and_enabled_afterwards() -> None:
    model, bare = trained(get_peft_model(net(), narrow())), net()(x())
    y = model(x())
    model.get_base_model().first.enable_adapters(False)
    with pytest.warns(UserWarning, match=rules.PARTLY_DISABLED.code), model.disable_adapter():
        assert torch.equal(model(x()), bare)
    assert torch.equal(model(x()), y)


def test_where_all_were_disabled_they_stay_so() -> None:
    model, bare = trained(get_peft_model(net(), narrow())), net()(x())
    for layer in (model.get_base_model().first, model.get_base_model().second):
        layer.enable_adapters(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            pass
    assert torch.equal(model(x()), bare)


def test_without_the_warning_the_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, switched, "if off and len(off) < len(wrappers):", "if False:")
    model = adapted()
    model.get_base_model().first.enable_adapters(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            pass


# saved while merged -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_merged_adapter_has_nothing_merged_in_it() -> None:
    model = trained(get_peft_model(net(), narrow(bias="all")))
    before = model.adapter_tensors("default")
    model.merge_adapter()
    assert same(model.adapter_tensors("default"), before)


@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
@pytest.mark.parametrize("at", range(1, 40))
def test_a_block_that_is_interrupted_on_its_way_out_leaves_adapters_on(at: int, merge: bool) -> None:
    """An interrupt at a line of what switches them on again; beyond the last line nothing happens."""
    model = whole()
    if merge:
        model.merge_adapter()
    y, before = model(x()), bits(model)
    lines = 0

    def interrupt(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in (switched.__file__, session.__file__):
            return interrupt if event == "call" else None
        if event == "line":
            lines += 1
            if lines == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return interrupt

    try:
        with model.disable_adapter():
            model(x())
            sys.settrace(interrupt)
            sys._getframe().f_trace = interrupt
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    assert model.session.enabled
    assert torch.equal(model(x()), y) and same(bits(model), before)
