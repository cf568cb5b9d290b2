"""Methods that start from the base's own parameters, and layers of which nothing else is known: norms, and modules at large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftc import PeftcError, PeftModel, get_peft_model
from peftc import plugin as api
from peftc.registry.manager import default_registry
from tests.unit.fakes import plugin


class TwinConfig(api.TargetsMixin, api.PeftConfig):
    """No options."""

    peft_type: api.PeftType | None = api.PeftType("TWIN")


class TwinTuner(api.MapTuner[TwinConfig]):
    """Every parameter is the mean of the layer's and of the adapter's, which starts as the layer's."""

    supports = frozenset(api.Kind)

    def slots(self, c: TwinConfig, layer: api.LayerFacts) -> Iterable[api.Slot]:
        for name, tensor in layer.params.items():
            yield api.module_slot("twin", tensor.shape, name)

    def init(self, c: TwinConfig, layer: api.LayerFacts, slots: Mapping[str, Tensor], init: api.SlotInit) -> None:
        for label, slot in api.labelled(self.slots(c, layer)).items():
            slots[label].copy_(api.to_stored(layer, slot.tail, init.base[slot.tail]))

    def params(self, a: api.View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        own = {slot.tail: label for label, slot in api.labelled(self.slots(TwinConfig(), a.layer)).items()}
        return {name: (p[name] + api.to_logical(a.layer, name, a[label])) / 2 for name, label in own.items()}


class Thin(TwinTuner):
    """Says that it adapts norms, but cannot."""

    params = api.MapTuner.params

    def thin(self, a: api.View) -> Any:
        raise NotImplementedError


def register(tuner: TwinTuner) -> None:
    method = api.TunerMethod("TWIN", TwinConfig, tuner, prefix="twin", layer_names=("twin",))
    default_registry().register(plugin(method), "twin")


@pytest.fixture(autouse=True)
def _twin() -> Iterator[None]:
    register(TwinTuner())
    yield
    default_registry().forget("TWIN")


class Gate(nn.Module):
    """A module of no known kind, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        """`(..., 6)` -> the same."""
        return hidden * self.strength * scale


class Chain(nn.Module):
    """One layer of every kind that has its parameters in another order than lowerings see them, and two of no kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 6, 2, padding=1)
        self.norm = nn.LayerNorm(6)
        self.gate = Gate()

    def forward(self, ids: Tensor) -> Tensor:
        """`(N, L)` ids -> `(N, L + 1, 6)`."""
        hidden = self.conv(self.embed(ids).movedim(1, -1)).movedim(-1, 1)
        out: Tensor = self.gate(scale=2.0, hidden=self.norm(input=hidden))
        return out


IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 7, 8]])
ALL = ["embed", "conv", "norm", "gate"]


def chain(*targets: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Chain().double().eval(), TwinConfig(target_modules=set(targets or ALL)))


def move(model: PeftModel, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def by_hand(model: PeftModel) -> Chain:
    """The bare model with the means in place."""
    torch.manual_seed(0)
    base = Chain().double().eval()
    own = model.state_dict()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            owner, _, tail = name.rpartition(".")
            twin = own.get(f"base_model.model.{owner}.twin.default.{tail}", parameter)
            parameter.copy_((parameter + twin) / 2)
    return base


@pytest.mark.parametrize("target", [*ALL, ""])
def test_parameters_are_copied_named_and_changed(target: str) -> None:
    model = chain(*([target] if target else ALL))
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in own} <= {"weight", "bias", "strength"}
    torch.manual_seed(0)
    torch.testing.assert_close(model(IDS), Chain().double()(IDS), rtol=0.0, atol=0.0)
    move(model)
    torch.testing.assert_close(model(IDS), by_hand(model)(IDS))


def test_what_is_stored_lies_as_in_the_layer() -> None:
    tensors = chain().adapter_tensors("default")
    shapes = {key.removeprefix("base_model.model."): tuple(t.shape) for key, t in tensors.items()}
    assert shapes == {
        "embed.twin.weight": (9, 4), "conv.twin.weight": (6, 4, 2), "conv.twin.bias": (6,), "norm.twin.weight": (6,),
        "norm.twin.bias": (6,), "gate.twin.strength": (6,),
    }  # fmt: skip


def test_merging_unmerging_and_rows() -> None:
    model = chain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    move(model)
    y = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), y)
    model.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if "twin" not in n)
    model.add_adapter("other", TwinConfig(target_modules=set(ALL)))
    model.set_adapter("other")
    move(model, 2)
    others = model(IDS)
    with model.disable_adapter():
        base = model(IDS)
    found = model(IDS, adapter_names=["default", "__base__", "other"])
    torch.testing.assert_close(found, torch.stack([y[0], base[1], others[2]]))


def test_a_start_is_read_without_what_is_merged() -> None:
    model = chain("norm")
    move(model)
    model.merge_adapter()
    model.add_adapter("late", TwinConfig(target_modules={"norm"}))
    norm = model.get_base_model().norm
    assert torch.equal(norm.twin["late"].weight, torch.ones(6, dtype=torch.float64))
    assert not torch.equal(norm.base_layer.weight, norm.twin["late"].weight)


def test_nothing_is_read_where_the_values_come_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chain()
    move(model)
    model.save_pretrained(tmp_path)

    def fail(*args: Any) -> None:
        raise AssertionError("the start was asked for")

    monkeypatch.setattr(TwinTuner, "init", fail)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Chain().double().eval(), tmp_path)
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_and_checkpoints(reentrant: bool) -> None:
    model = chain("norm", "gate")
    move(model)
    seen: list[Tensor] = []
    norm = model.get_base_model().norm
    handle = norm.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    y = norm(torch.randn(2, 6, dtype=torch.float64))
    assert seen[0] is y
    handle.remove()
    hidden = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    plain = model.get_base_model().gate(hidden=norm(hidden))
    plain.sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.partition(".twin")[0].rpartition(".")[2] for name in wanted} == {"norm", "gate"}
    model.zero_grad()
    again = checkpoint(lambda h: model.get_base_model().gate(hidden=norm(h)), hidden, use_reentrant=reentrant)
    again.sum().backward()
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name])


def test_a_module_without_parameters_or_with_more_in_it_is_refused_with_those_in_it() -> None:
    base = nn.ModuleDict({"block": nn.Sequential(nn.Linear(2, 2)), "whole": Gate()})
    base.block.norm = nn.LayerNorm(2)
    base.whole.mix = nn.Linear(6, 6)
    with pytest.raises(PeftcError) as caught:
        get_peft_model(base, TwinConfig(target_modules={"block", "whole"}))
    first, second = (str(problem) for problem in caught.value.diagnostics)
    assert "`block` is a Sequential with layers in it, which have parameters too, which TWIN cannot adapt" in first
    assert "Name the layers in it: `norm`." in first
    assert "Name the layers in it: `mix`." in second
    with pytest.raises(PeftcError, match="`0` is a Dropout without parameters of its own"):
        get_peft_model(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), TwinConfig(target_modules={"0"}))


def test_a_method_that_cannot_change_parameters_is_no_method_for_norms() -> None:
    register(Thin())
    with pytest.raises(PeftcError, match="has no `params`"):
        chain("norm")
