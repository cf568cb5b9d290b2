"""Adapters that act around calls: what they weigh is loaded, planned and activated with them, and multiplied as they say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftc import PeftModel
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.model.parts.files import _plan_of
from tests.runtime.methods import Net, adapted, mix, narrow, x


def mixed(**options: object) -> PeftModel:
    """A mixture of one adapter on the first layer, and one on the first two."""
    config = mix(narrow(target_modules=["first"]), narrow(), **options)
    torch.manual_seed(1)
    return adapted(config).eval()


def by_hand(model: PeftModel, shares: Tensor) -> Tensor:
    net = model.get_base_model()
    h = x()
    for depth, layer in enumerate((net.first, net.second), 1):
        y = layer.base_layer(h)
        for number, name in enumerate(("default_p0", "default_p1")):
            if name in layer.narrow_A:
                y = y + depth * shares[number] * 0.5 * h @ layer.narrow_A[name].weight.T @ layer.narrow_B[name].weight.T
        h = y.relu()
    return net.head(h)


def test_updates_are_multiplied_by_layer_and_adapter() -> None:
    model = mixed()
    y = model(x())
    torch.testing.assert_close(y, by_hand(model, model.base_model.acting["shares"]))
    with model.disable_adapter():
        base = model(x())
    assert torch.equal(model.base_model.acting.state["without"], base)
    torch.testing.assert_close(model.base_model(x()), y)


@pytest.mark.parametrize("trains", [False, True])
def test_the_plan_equals_the_model(trains: bool) -> None:
    model = mixed(trains=trains)
    planned = {p.name: p.trainable for name in model.session.plans for p in model.session.plans[name].parameters()}
    new = {n: p.requires_grad for n, p in model.named_parameters() if "narrow" in n or "mixer" in n}
    assert new == planned
    assert sum(new.values()) == (7 if trains else 1)
    model(x()).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, on in new.items() if on}


def test_saving_holds_the_own_storage_alone(tmp_path: Path) -> None:
    model = mixed()
    model.save_pretrained(tmp_path)
    assert list(model.adapter_tensors("default")) == ["base_model.mixer.shares"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    wanted = model.base_model.acting["shares"]
    torch.testing.assert_close(loaded(x()), by_hand(loaded, wanted))
    plan = _plan_of(model, "default")
    assert plan_from_json(plan_to_json(plan)).adapters == plan.adapters


def test_a_copy_weighs_its_own_adapters() -> None:
    model = mixed()
    y = model(x())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.acting["shares"].zero_()
    assert torch.equal(model(x()), y)
    assert not torch.equal(twin(x()), y)


def test_a_failed_load_leaves_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    names = [name for name, _ in net.named_modules()]
    config = mix(narrow())
    config.parts["broken"] = str(tmp_path)
    with pytest.raises(Exception, match="PC"):
        adapted(config)
    assert [name for name, _ in net.named_modules()] == names


def test_unloading_takes_everything_out() -> None:
    model = mixed()
    base = model.get_base_model()
    model.unload()
    assert [type(module) for module in base.children()] == [type(module) for module in Net().children()]
