"""Views of the other adapters on a layer: which there are, what is kept of them, and what plans tell of who weighs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, PeftModel, compile_plan, get_peft_model, rules
from peftc.compiler.passes import calls
from peftc.plugin import (
    LINEAR_KINDS,
    LayerFacts,
    MapTuner,
    ModuleNode,
    PeftConfig,
    PeftType,
    Slot,
    SlotInit,
    TargetsMixin,
    TunerMethod,
    View,
    parameter_slot,
    register_plugin,
    unregister_plugin,
)
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.slots import views
from tests.defects import put_defect
from tests.runtime.methods import Net, mix, narrow

TARGETS = ["0"]


class LeanConfig(TargetsMixin, PeftConfig):
    peft_type: PeftType | None = PeftType("LEAN")
    leans: bool = False
    """Add what others do, and nothing else."""
    factor: float = 1.0
    """The scaling."""


class Own(MapTuner[LeanConfig]):
    """`y = W x + b + s · l`."""

    supports = LINEAR_KINDS

    def slots(self, c: LeanConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("lean_l", (layer.out_features,))

    def init(self, c: LeanConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        init.normal(slots["lean_l"])

    def scaling(self, c: LeanConfig, layer: LayerFacts) -> float:
        return c.factor

    def branch(self, a: View[LeanConfig], x: Tensor, y0: Tensor) -> Tensor:
        return (a.lean_l * a.scaling).expand_as(y0)


class Leaning(Own):
    """The sum of what the others would add."""

    weighs_siblings = True
    made = 0

    def branch(self, a: View[LeanConfig], x: Tensor, y0: Tensor) -> Tensor:
        others = {name: view for name, view in a.siblings.items() if not view.config.leans}

        def total() -> Tensor:
            Leaning.made += 1
            return sum((view.lean_l * view.scaling for view in others.values()), torch.zeros(y0.shape[-1]))

        return a.kept("total", total, slots=("lean_l",), of=[*others]).expand_as(y0)


def chosen(c: LeanConfig, node: ModuleNode) -> Own:
    return LEANING if c.leans else OWN


OWN, LEANING = Own(), Leaning()
METHOD = TunerMethod("LEAN", LeanConfig, chosen, choices=(OWN, LEANING), prefix="lean_", layer_names=("lean_l",))


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    register_plugin(METHOD)
    yield
    unregister_plugin(METHOD)


def leaning(*names: str) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), LeanConfig(target_modules=TARGETS, leans=True), "sum")
    for place, name in enumerate(names):
        model.add_adapter(name, LeanConfig(target_modules=TARGETS, factor=1.0 + place))
    model.set_adapter("sum")
    return model.eval()


def expected(model: PeftModel, *names: str) -> Tensor:
    layer: Any = model.get_base_model()[0]  # type: ignore[index]
    found: Tensor = layer.base_layer(torch.ones(2, 3))
    for name in names:
        found = found + layer.lean_l[name] * layer.scaling[name]
    return found


def check(model: PeftModel, *names: str) -> None:
    torch.testing.assert_close(model(torch.ones(2, 3)), expected(model, *names))


def test_others_come_and_go() -> None:
    model = leaning("a", "b")
    check(model, "a", "b")
    model.add_adapter("c", LeanConfig(target_modules=TARGETS, factor=5.0))
    check(model, "a", "b", "c")
    model.delete_adapter("a")
    check(model, "b", "c")
    model.delete_adapter("b")
    model.delete_adapter("c")
    check(model)


def write(layer: Any) -> None:
    with torch.no_grad():
        layer.lean_l["b"].mul_(3)


def swap(layer: Any) -> None:
    layer.lean_l["a"] = nn.Parameter(torch.randn(4))


def scale(layer: Any) -> None:
    layer.set_scale("b", 7)


CHANGES = {"written": write, "swapped": swap, "scaled": scale}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_kept_is_of_them_as_they_are(change: Any) -> None:
    model = leaning("a", "b")
    Leaning.made = 0
    for _ in range(3):
        check(model, "a", "b")
    assert Leaning.made == 1
    change(model.get_base_model()[0])  # type: ignore[index]
    check(model, "a", "b")
    assert Leaning.made == 2


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_that_test_can_fail(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, views, "[siblings[name] for name in of] or [self]", "[self]")
    with pytest.raises(AssertionError):
        test_what_is_kept_is_of_them_as_they_are(change)


def test_while_one_of_them_trains_nothing_is_kept() -> None:
    model = leaning("a").train()
    Leaning.made = 0
    for _ in range(2):
        check(model, "a")
    assert Leaning.made == 1
    model.base_model.set_adapter(["sum", "a"])
    for _ in range(2):
        model(torch.ones(2, 3))
    assert Leaning.made == 3


def test_plans_tell_who_weighs_others() -> None:
    graph = snapshot(nn.Sequential(nn.Linear(3, 4)))
    for leans in (False, True):
        plan = compile_plan(graph, {"sum": LeanConfig(target_modules=TARGETS, leans=leans)})
        told = [note for note in plan.adapters[0].notes if "weighed; alone it cannot act" in note]
        assert len(told) == leans


@pytest.mark.parametrize("is_broken", [False, True])
def test_who_weighs_others_is_not_weighed(is_broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_broken:
        put_defect(monkeypatch, calls, "if tuner.weighs_siblings", "if False")
    config = mix(narrow(), LeanConfig(target_modules=["first"], leans=True))
    told = ""
    try:
        get_peft_model(Net(), config)
    except PeftcError as error:
        told = str(error)
    assert (rules.CANNOT_GATE.code in told) is not is_broken
