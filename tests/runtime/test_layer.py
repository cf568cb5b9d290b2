"""A wrapped layer stands in for its base: attributes, devices, swapped tensors, and interruption while it is put on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftc import PeftcError, PeftModel, compile_plan, rules
from peftc.plugin import MapTuner, View
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.layer.wrapper import TunerLayer
from tests.runtime.methods import NarrowTuner, Net, adapted, narrow, x
from tests.unit.fakes import plugin

Swap = Callable[[PeftModel, dict[str, Tensor]], Tensor]


def changed_slots(model: PeftModel) -> dict[str, Tensor]:
    """All tensors of the model, those of the adapter negated in one factor."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {name: -tensor if "narrow_B" in name else tensor for name, tensor in state.items()}


def by_load(model: PeftModel, state: dict[str, Tensor]) -> Tensor:
    model.load_state_dict(state)
    return model(x())


def by_assigning_load(model: PeftModel, state: dict[str, Tensor]) -> Tensor:
    model.load_state_dict(state, assign=True)
    return model(x())


def by_functional_call(model: PeftModel, state: dict[str, Tensor]) -> Tensor:
    return functional_call(model, state, (x(),))


def by_data(model: PeftModel, state: dict[str, Tensor]) -> Tensor:
    for name, parameter in model.named_parameters():
        parameter.data = state[name]
    return model(x())


@pytest.mark.parametrize("swap", [by_load, by_assigning_load, by_functional_call, by_data])
def test_swapped_tensors_take_effect(swap: Swap) -> None:
    torch.manual_seed(0)
    model = adapted()
    state = changed_slots(model)
    layer = model.get_base_model().first
    update = layer(x()) - layer.base_layer(x())
    found = swap(model, state)
    fresh = adapted()
    fresh.load_state_dict(state)
    torch.testing.assert_close(found, fresh(x()), rtol=0.0, atol=0.0)
    again = fresh.get_base_model().first
    torch.testing.assert_close(again(x()) - again.base_layer(x()), -update)


def test_attributes_of_the_base_layer_are_there() -> None:
    layer = adapted().get_base_model().first
    assert isinstance(layer, TunerLayer)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (8, 8)
    assert layer.get_base_layer() is layer.base_layer
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


def test_a_layer_moves_with_its_model() -> None:
    model = adapted().to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(x().double()).dtype == torch.float64
    assert {p.device.type for p in adapted().to("meta").parameters()} == {"meta"}


def test_the_training_mode_reaches_every_level() -> None:
    model = adapted()
    for mode in (False, True):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}


def test_a_layer_takes_the_training_mode_of_its_base() -> None:
    base = Net().eval()
    assert not PeftModel(base, narrow()).get_base_model().first.training


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_interrupted_apply_leaves_the_model_alone(interruption: type[BaseException]) -> None:
    base = Net()
    before = dict(base.named_modules())
    plan = compile_plan(snapshot(base), {"default": narrow()})
    asked: list[str] = []

    def source(key: str) -> Tensor | None:
        asked.append(key)
        if len(asked) == 3:  # the first tensor of the second layer
            raise interruption
        return None

    with pytest.raises(interruption):
        PeftModel.from_plan(base, plan, {"default": source})
    after = dict(base.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert all(p.requires_grad for p in base.parameters())
    assert isinstance(PeftModel.from_plan(base, plan).get_base_model().first, TunerLayer)


def test_what_a_checkpoint_lacks_is_initialised_and_what_it_has_stays() -> None:
    base = Net()
    plan = compile_plan(snapshot(base), {"default": narrow()})
    kept = torch.full((2, 8), 3.0)
    given = {"base_model.model.first.narrow_A.weight": kept}
    model = PeftModel.from_plan(base, plan, {"default": given.get})
    layer = model.get_base_model().first
    assert torch.equal(layer.narrow_A["default"].weight, kept)
    assert layer.narrow_B["default"].weight.isfinite().all()
    assert layer.narrow_B["default"].weight.any()


class OnlyBranch(NarrowTuner):
    """Says what it adds to the output, and nothing of the weight."""

    thin = MapTuner.thin

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        return x @ a.narrow_A.T @ a.narrow_B.T


def test_what_has_no_weight_cannot_be_merged() -> None:
    method = default_registry().get("NARROW")
    default_registry().register(plugin(replace(method, tuner=OnlyBranch())), "narrow")
    model = adapted()
    y = model(x())
    with pytest.raises(PeftcError) as caught:
        model.merge_adapter()
    assert [d.code for d in caught.value.diagnostics] == [rules.CANNOT_MERGE.code]
    assert torch.equal(model(x()), y)
    assert not model.get_base_model().first.merged


def test_the_printed_layer_says_what_acts() -> None:
    model = adapted(None, other=narrow())
    assert "adapters=['default', 'other'], active=['default']" in repr(model)
    assert isinstance(model.get_base_model().head, nn.Linear)
