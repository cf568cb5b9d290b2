"""Batches whose rows have different adapters: each row is computed as if alone, in training and through checkpointing too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftc import PeftModel, get_peft_model
from peftc.plugin import MapTuner, View
from peftc.registry.manager import default_registry
from peftc.runtime.layer.wrapper import TunerLayer
from tests.runtime.methods import LANGUAGE_MODEL, NarrowTuner, Net, StretchTuner, narrow, stretch, x
from tests.runtime.test_nesting import Turned
from tests.unit.fakes import plugin

NAMES = ["one", "__base__", "two", "three", "one"]


class AsBranch(NarrowTuner):
    """The thin update, told as a branch."""

    thin = MapTuner.thin

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        return (x @ a.narrow_A.T) @ a.narrow_B.T / 2


class AsInput(StretchTuner):
    """Scales what goes in."""

    output = MapTuner.output

    def input(self, a: View, x: Tensor) -> Tensor:
        return x * a.stretch_l.mean()


def with_tuner(peft_type: str, tuner: MapTuner[Any] | None) -> None:
    if tuner is not None:
        method = default_registry().get(peft_type)
        default_registry().register(plugin(replace(method, tuner=tuner)), peft_type.lower())


def three(base: nn.Module | None = None, **options: Any) -> PeftModel:
    """Two narrow updates of different ranks and a stretch, on layers that overlap."""
    torch.manual_seed(2)
    model = get_peft_model(Net() if base is None else base, narrow(**options), "one", mixed=True)
    model.add_adapter("two", narrow(r=3, **options))
    model.add_adapter("three", stretch(**options))
    return model


def alone(model: PeftModel, name: str, *args: Any, **kwargs: Any) -> Any:
    """The call with one adapter for all rows."""
    if name == "__base__":
        with model.disable_adapter():
            return model(*args, **kwargs)
    active = model.active_adapters
    model.set_adapter(name)
    found = model(*args, **kwargs)
    model.set_adapter(active)
    return found


@pytest.mark.parametrize(
    ("thin", "scale"),
    [(None, None), (AsBranch(), AsInput()), (None, Turned()), (AsBranch(), Turned())],
    ids=["thin and output", "branch and input", "thin and parameters", "branch and parameters"],
)
@pytest.mark.parametrize("names", [NAMES, ["two"] * 5, ["three", "one", "one", "three", "two"], ["__base__"] * 5])
def test_each_row_is_as_if_alone(thin: MapTuner[Any] | None, scale: MapTuner[Any] | None, names: Sequence[str]) -> None:
    with_tuner("NARROW", thin)
    with_tuner("STRETCH", scale)
    model = three()
    found = model(x(), adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], alone(model, name, x())[row])
    torch.testing.assert_close(model(x()), alone(model, "one", x()), rtol=0.0, atol=0.0)


def test_modules_trained_whole_have_rows_too() -> None:
    model = three()
    model.add_adapter("four", narrow(target_modules=["first"], modules_to_save=["head"]))
    model.add_adapter("five", narrow(target_modules=["second"], modules_to_save=["head"]))
    with torch.no_grad():
        for twin in model.get_base_model().head.modules_to_save.values():
            twin.weight.normal_()
    names = ["five", "one", "four", "four", "__base__"]
    found = model(x(), adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], alone(model, name, x())[row])


def gradients(model: PeftModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys() != set()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=name)


def test_rows_train_their_adapters() -> None:
    model = three()
    model.set_requires_grad(["one", "two", "three"])
    model(x(), adapter_names=NAMES).square().sum().backward()
    together = gradients(model)
    for row, name in enumerate(NAMES):
        if name != "__base__":
            model.set_adapter(name)
            model.set_requires_grad(["one", "two", "three"])
            model(x()[row : row + 1]).square().sum().backward()
    close(together, gradients(model))


class Checkpointed(nn.Module):
    """A net whose layers are checkpointed, one by one."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.net = Net()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.net(x)
        for layer in (self.net.first, self.net.second):
            x = checkpoint(layer, x, use_reentrant=self.reentrant).relu()
        return checkpoint(self.net.head, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in another thread"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_repetition_sees_the_rows_of_its_own_call(reentrant: bool, elsewhere: bool) -> None:
    def losses(checkpointed: bool | None) -> tuple[PeftModel, Tensor]:
        torch.manual_seed(0)
        model = three(Checkpointed(checkpointed))
        model.set_requires_grad(["one", "two", "three"])
        rows = x().requires_grad_()
        others = ["two", "two", "three", "__base__", "one"]
        first, second = (model(rows, adapter_names=names).square().sum() for names in (NAMES, others))
        return model, first + 3 * second + 5 * model(rows).square().sum()

    model, wanted = losses(None)
    wanted.backward()
    twin, found = losses(reentrant)
    torch.testing.assert_close(found, wanted)
    run(found.backward, elsewhere)
    close(gradients(twin), gradients(model))


def run(action: Callable[[], object], elsewhere: bool) -> None:
    if elsewhere:
        thread = threading.Thread(target=action)
        thread.start()
        thread.join()
    else:
        action()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_language_model_with_its_own_checkpointing(reentrant: bool) -> None:
    ids = LANGUAGE_MODEL.arguments()["input_ids"][:2]

    def trained(checkpointing: bool) -> dict[str, Tensor]:
        base = LANGUAGE_MODEL.build()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = three(base, target_modules="all-linear").train()
        model.set_requires_grad(["one", "two", "three"])
        names = ["two", "three"]
        model(input_ids=ids, labels=ids, adapter_names=names[: len(ids)]).loss.backward()
        return gradients(model)

    close(trained(True), trained(False))


def test_calls_do_not_see_each_other() -> None:
    """A model inside another, rows in each."""
    outer, inner = three(), three()
    inner.set_adapter("two")
    own = inner(x(), adapter_names=["one"] * 5)
    bare = inner(x())
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.extend([inner(x()), inner(x(), adapter_names=["one"] * 5)])

    outer.get_base_model().first.register_forward_hook(look)
    outer(x(), adapter_names=NAMES)
    assert torch.equal(seen[0], bare)
    assert torch.equal(seen[1], own)


def test_threads_do_not_see_each_other() -> None:
    model = three()
    wanted = {name: alone(model, name, x()) for name in ("one", "two")}
    found: dict[str, list[Tensor]] = {"one": [], "two": []}

    def work(name: str) -> None:
        with torch.no_grad():
            found[name] += [model(x(), adapter_names=[name] * 5) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, outputs in found.items():
        assert len(outputs) == 20
        for out in outputs:
            torch.testing.assert_close(out, wanted[name])


def looks(layer: TunerLayer) -> bool:
    return "by_rows" in getattr(getattr(layer._path, "plain", layer._path), "__qualname__", "")


def test_layers_look_for_rows_only_once_a_call_had_some() -> None:
    model = three()
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    assert not any(looks(layer) for layer in layers)
    with model.disable_adapter():
        bare = model(x())
        assert torch.equal(model(x(), adapter_names=NAMES), bare), "disabled is disabled"
    assert all(looks(layer) for layer in layers)
    model.add_adapter("late", narrow(target_modules=["head"]))
    names = ["late", "one", "late", "__base__", "two"]
    found = model(x(), adapter_names=names)
    torch.testing.assert_close(found[2], alone(model, "late", x())[2])


def test_thin_updates_are_one_product_and_the_base_runs_once() -> None:
    model = get_peft_model(Net(), narrow(), "0")
    for i in range(1, 5):
        model.add_adapter(str(i), narrow())
    calls: list[int] = []
    model.get_base_model().first.base_layer.register_forward_hook(lambda *args: calls.append(1))
    with torch.profiler.profile() as profile:
        model(x(), adapter_names=["4", "2", "0", "1", "3"])
    assert calls == [1]
    products = {event.key: event.count for event in profile.key_averages()}
    assert products["aten::bmm"] == 4, "two for each of the two adapted layers"
