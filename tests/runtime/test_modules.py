"""Module sites in general: named and unnamed slots, blocks in blocks, places that others take, and failures half-way."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, PeftcWarning, PeftModel, get_peft_model
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.drift import differences
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.plugin import (
    ConfigModel,
    Container,
    LayerFacts,
    MapTuner,
    ModuleGraph,
    ModuleNode,
    ModuleTuner,
    ModuleView,
    PeftConfig,
    PeftType,
    Slot,
    SlotInit,
    TunerMethod,
)
from peftc.runtime.applying.apply import apply_plan
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.around.modules import ModuleWrapper
from peftc.testing.compare import objects_of
from tests.unit.fakes import registered


class RingConfig(PeftConfig):
    """Options of the ring."""

    peft_type: PeftType | None = PeftType("RING")
    around: list[str] = ["blocks.1"]
    named: bool = False
    fails: str = ""


class RingTuner(ModuleTuner[RingConfig]):
    """`y = module(x) · scale + shift`: the shift in a module of its own beside its doubled, the scale a bare parameter."""

    def sites(self, c: RingConfig, graph: ModuleGraph) -> Mapping[str, str]:
        return dict.fromkeys(c.around, "around")

    def slots(self, c: RingConfig, node: ModuleNode, graph: ModuleGraph) -> Iterable[Slot]:
        yield Slot("ring_shift", (4,), Container.MODULE, "weight", named=c.named)
        yield Slot("ring_scale", (1,), named=c.named or c.fails == "half named")

    def init(self, c: RingConfig, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        if c.fails == "init":
            raise ZeroDivisionError("on purpose")
        init.normal(slots["ring_shift"])
        init.normal(slots["ring_scale"])

    def forward(self, a: ModuleView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return a.module(*args, **kwargs) * a.ring_scale + a.ring_shift


class FlatTuner(MapTuner[RingConfig]):
    """A method on layers whose slot goes without the adapter's name, which no layer can hold."""

    supports = frozenset()

    def slots(self, c: RingConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield Slot("ring_scale", (1,), named=False)

    def init(self, c: RingConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        raise NotImplementedError


RING = TunerMethod("RING", RingConfig, RingTuner(), prefix="ring_", layer_names=("ring_shift", "ring_scale"))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(RING):
        yield


class Block(nn.Module):
    """A block with a layer in it, which reads a hint off itself."""

    hint = 3

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.core(x)
        return out


class Net(nn.Module):
    """Three blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * block.hint
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def x() -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4)


def ring(*around: str, **options: Any) -> RingConfig:
    return RingConfig(around=list(around) or ["blocks.1"], **options)


def adapted(config: RingConfig | None = None, **others: RingConfig) -> PeftModel:
    model = get_peft_model(net(), config or ring())
    for name, other in others.items():
        model.add_adapter(name, other)
    return model


def own(model: nn.Module) -> list[str]:
    """Names of what the adapters have put into the model."""
    return [name.removeprefix("base_model.model.blocks.") for name, _ in model.named_parameters() if "ring_" in name]


def test_unnamed_slots_are_those_of_the_active_adapter() -> None:
    model = adapted(other=ring("blocks.0", "blocks.1"))
    assert own(model) == ["1.ring_scale", "1.ring_shift.weight"]
    first = model(x())
    model.set_adapter("other")
    assert own(model) == ["0.ring_scale", "0.ring_shift.weight", "1.ring_scale", "1.ring_shift.weight"]
    assert not torch.equal(model(x()), first)
    model.set_adapter("default")
    assert own(model) == ["1.ring_scale", "1.ring_shift.weight"]
    assert torch.equal(model(x()), first)


def test_named_slots_stay_in_the_model() -> None:
    config = ring(named=True)
    model = adapted(config, other=config)
    names = [
        f"1.ring_{slot}" for slot in ("scale.default", "scale.other", "shift.default.weight", "shift.other.weight")
    ]
    assert sorted(own(model)) == names
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("default" in name for name in trained) and len(trained) == 2
    first = model(x())
    model.set_adapter("other")
    assert sorted(own(model)) == names
    assert not torch.equal(model(x()), first)
    with pytest.warns(PeftcWarning, match="`default` is active now"):
        model.delete_adapter("other")
    assert torch.equal(model(x()), first)
    assert len(own(model)) == 2
    with pytest.warns(PeftcWarning, match="no adapter is left"):
        model.delete_adapter("default")
    assert type(model.get_base_model().blocks[1]) is Block


@pytest.mark.parametrize("options", [{}, {"named": True}, {"fails": "half named"}], ids=str)
def test_plan_and_model_have_the_same_names(options: dict[str, Any]) -> None:
    config = ring("blocks.2", "blocks.0", **options)
    plan = compile_plan(snapshot(net()), {"a": config, "b": ring(**options)}, active=["b"])
    assert plan_from_json(plan_to_json(plan)) == plan
    model = PeftModel.from_plan(net(), plan)
    planned = {p.name: p.trainable for p in plan.parameters()}
    assert {n: p.requires_grad for n, p in model.named_parameters() if "ring_" in n} == planned
    assert model.get_nb_trainable_parameters() == plan.counts()
    assert {*model.adapter_tensors("a")} == {p.disk for p in plan.adapter("a").parameters()}


def test_several_act_together_on_different_modules() -> None:
    model = adapted(ring("blocks.0"), other=ring("blocks.1"))
    model.set_adapter(["default", "other"])
    assert len(own(model)) == 4
    together = model(x())
    model.set_adapter("other")
    assert not torch.equal(model(x()), together)


def test_a_block_in_a_block() -> None:
    base = net()
    objects = objects_of(base)
    model = get_peft_model(base, ring("blocks.1", "blocks.1.core"))
    assert "1.base_layer.core.ring_scale" in own(model)
    assert torch.isfinite(model(x())).all()
    assert snapshot(base).digest == snapshot(net()).digest
    model.unload()
    assert objects_of(base) == objects


def test_training_mode_and_attributes_are_the_module_s() -> None:
    model = adapted(other=ring("blocks.0"))
    model.set_adapter("other")
    model.train()
    model.set_adapter("default")
    wrapper = model.get_base_model().blocks[1]
    assert isinstance(wrapper, ModuleWrapper) and wrapper.training
    assert wrapper.hint == 3
    assert "active=['default']" in repr(wrapper)
    with pytest.raises(AttributeError):
        _ = wrapper.nothing


def test_what_others_put_in_the_place_stays() -> None:
    class Watched(nn.Module):
        """Another library's wrapper."""

        hint = 3

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.module(x)
            return out

    model = adapted(other=ring("blocks.0"))
    blocks = model.get_base_model().blocks
    blocks[1] = outside = Watched(blocks[1])
    active = model(x())
    model.set_adapter("other")
    assert blocks[1] is outside
    blocks[2] = inside = Watched(blocks[2])
    model.add_adapter("third", ring("blocks.2"))
    model.set_adapter("third")
    model(x())
    assert isinstance(blocks[2], ModuleWrapper) and (outside.calls, inside.calls) == (2, 1)
    model.set_adapter("default")
    assert blocks[2] is inside
    assert torch.equal(model(x()), active)


def test_copies_are_apart() -> None:
    model = adapted(other=ring())
    twin = copy.deepcopy(model)
    before = model(x())
    twin.set_adapter("other")
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x()), before)
    assert not torch.equal(twin(x()), before)
    assert twin.get_base_model().blocks[1] is not model.get_base_model().blocks[1]


@pytest.mark.parametrize("named", [False, True])
def test_a_failure_half_way_leaves_the_model_as_it_was(named: bool) -> None:
    model = adapted(ring(named=named))
    before, y = objects_of(model), model(x())
    with pytest.raises(PeftcError, match="PC205"):
        model.add_adapter("other", ring("blocks.0", "blocks.1", fails="init", named=named))
    assert (objects_of(model), list(model.peft_config)) == (before, ["default"])
    assert torch.equal(model(x()), y)
    base = net()
    objects = objects_of(base)
    with pytest.raises(PeftcError, match="PC205"):
        get_peft_model(base, ring("blocks.0", fails="init"))
    assert objects_of(base) == objects
    assert set(base.__dict__) == set(net().__dict__)


def test_a_folder_brings_an_adapter_back(tmp_path: Path) -> None:
    model = adapted(ring("blocks.0", "blocks.2", named=True))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(loaded(x()), model(x()))
    assert not any(p.requires_grad for p in loaded.parameters())


# what is refused ------------------------------------------------------------------------------------------------------


def planned(**options: Any) -> InjectionPlan:
    return compile_plan(snapshot(net()), {"default": ring(**options)})


def test_a_plan_for_modules_that_are_not_there() -> None:
    plan = plan_from_json(plan_to_json(planned()))
    other = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    assert any("no `blocks.1`" in d.what for d in differences(plan, snapshot(other)))
    with pytest.raises(PeftcError, match="PC504"):
        apply_plan(nn.ModuleDict({"block": Block()}), planned())


@pytest.mark.parametrize("path", ["blocks.7", ""])
def test_a_plugin_that_names_no_module(path: str) -> None:
    with pytest.raises(PeftcError, match="PC204") as caught:
        compile_plan(snapshot(net()), {"default": RingConfig(around=[path])})
    assert "`sites` of RING" in str(caught.value)


def test_a_layer_s_slot_must_have_the_adapter_s_name() -> None:
    from peftc.compiler.passes.draft import Context
    from peftc.compiler.passes.sites import check_slots

    flat = TunerMethod("RING", RingConfig, FlatTuner(), prefix="ring_", layer_names=("ring_scale",))
    context = Context(snapshot(net()), flat, "default")
    with pytest.raises(PeftcError, match="not named by its adapter"):
        check_slots(tuple(FlatTuner().slots(ring(), LayerFacts.__new__(LayerFacts))), context, "blocks.1")


def test_a_view_knows_its_slots() -> None:
    model = adapted()
    wrapper = model.session.modules["blocks.1"]
    from peftc.runtime.around.modules import View

    view = View(wrapper, "default")
    assert view.ring_scale is wrapper._parameters["ring_scale"]
    assert isinstance(view.config, ConfigModel) and isinstance(view.module, Block)
    with pytest.raises(AttributeError, match=r"no slot `ring_scal`; there are \['ring_scale', 'ring_shift'\]"):
        _ = view.ring_scal
