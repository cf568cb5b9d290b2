"""Slots whose modules somebody hooks, wraps, replaces or computes: they are called, and what they give is what counts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from peftc import PeftModel
from peftc.runtime.slots.containers import SlotModule
from peftc.testing.subjects import Subject
from tests.runtime.examples import examples, rows, small_layers

FOUND = examples(small_layers)


def slot_modules(model: nn.Module) -> dict[str, SlotModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SlotModule)}


EACH = pytest.mark.parametrize("subject", rows(s for s in FOUND if slot_modules(s.wrap())))


class Wrapper(nn.Module):
    """What stands round a module, and counts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


def hooked(model: nn.Module, name: str, module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: None)


def hooked_before(model: nn.Module, name: str, module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: None)


def hooked_behind(model: nn.Module, name: str, module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, grads, given: None)


def wrapped(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Wrapper(module))


def replaced(model: nn.Module, name: str, module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def parametrized(model: nn.Module, name: str, module: nn.Module) -> None:
    for tail in list(module._parameters):
        parametrize.register_parametrization(module, tail, Same())


def pruned(model: nn.Module, name: str, module: nn.Module) -> None:
    for tail in list(module._parameters):
        prune.identity(module, tail)


CHANGES = [hooked, hooked_before, hooked_behind, wrapped, replaced, parametrized, pruned]


def computed(subject: Subject, model: PeftModel) -> tuple[Tensor, list[Tensor]]:
    """The output, and gradients of all that trains in the order of the slots."""
    model.zero_grad(set_to_none=True)
    y = subject.run(model)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@EACH
@pytest.mark.parametrize("change", CHANGES)
def test_it_computes_and_learns_the_same(subject: Subject, change: Callable[..., None]) -> None:
    model = subject.trained()
    wanted, gradients = computed(subject, model)
    for name, module in slot_modules(model).items():
        change(model, name, module)
    found, others = computed(subject, model)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(others) > 0
    for one, other in zip(sorted(gradients, key=_key), sorted(others, key=_key), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if change is pruned:
        return  # of which torch makes no copies
    copied = deepcopy(model)
    torch.testing.assert_close(subject.output(copied), wanted, rtol=1e-5, atol=1e-5)


def _key(tensor: Tensor) -> tuple[list[int], float]:
    return list(tensor.shape), float(tensor.double().abs().sum())


@EACH
def test_each_module_is_called_once_and_may_change_what_it_gives(subject: Subject) -> None:
    model = subject.trained()
    with_adapter = subject.output(model)
    with model.disable_adapter():
        without = subject.output(model)
    calls: dict[str, int] = {}
    handles = []
    for name, module in slot_modules(model).items():

        def count(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1

        handles.append(module.register_forward_hook(count))
    subject.output(model)
    assert calls == dict.fromkeys(slot_modules(model), 1)
    for module in slot_modules(model).values():
        handles.append(module.register_forward_hook(lambda module, args, out: _zero(out)))
    silent = subject.output(model)
    assert not torch.allclose(silent, with_adapter, atol=1e-4)
    layer = next(iter(model.session.layers.values()))
    if subject.foremost and "thin" in layer.part("default").tuner.lowerings:  # an update of zeros is none
        torch.testing.assert_close(silent, without, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert torch.equal(subject.output(model), with_adapter)


def _zero(out: Any) -> Any:
    return out * 0 if isinstance(out, Tensor) else tuple(part * 0 for part in out)


@EACH
def test_rows_of_hooked_slots(subject: Subject) -> None:
    if subject.parameters:
        pytest.skip("rows are not told apart inside of modules")
    model = subject.trained()
    subject.join(model, "other")
    count = next(iter(subject.model.arguments().values())).shape[0]
    names = ["default", "other", "__base__", *["default"] * count][:count]
    wanted = subject.rows(model, names)
    for name, module in slot_modules(model).items():
        hooked(model, name, module)
    torch.testing.assert_close(subject.rows(model, names), wanted, rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.parametrize("change", CHANGES)
def test_what_others_changed_is_switched_merged_and_deleted(subject: Subject, change: Callable[..., None]) -> None:
    model = subject.trained()
    subject.join(model, "other")
    wanted = subject.output(model)
    for name, module in slot_modules(model).items():
        if "default" in name:
            change(model, name, module)
    model.set_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(subject.output(model), wanted, rtol=1e-5, atol=1e-5)
    if subject.merges:
        model.merge_adapter()
        torch.testing.assert_close(subject.output(model), wanted, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    model.delete_adapter("default")
    model.set_adapter("other")
    assert subject.output(model).isfinite().all()


DROPPING = rows(s for s in FOUND if s.method.layer_dropout and s.foremost)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("subject", DROPPING)
def test_dropouts_are_modules_that_are_called(subject: Subject, p: float) -> None:
    model = subject.trained(**{subject.method.layer_dropout: p})
    without = subject.output(model)
    layer = next(iter(model.session.layers.values()))
    dropout = getattr(layer, subject.method.layer_dropout)["default"]
    assert getattr(layer, subject.method.layer_dropout)["default"] is dropout
    assert isinstance(dropout, nn.Dropout if p else nn.Identity)
    assert torch.equal(subject.output(model), without)
    dropout.register_forward_hook(lambda module, args, out: out * 3)
    assert not torch.allclose(subject.output(model), without)


@pytest.mark.parametrize("subject", DROPPING)
def test_who_switches_dropouts_off_finds_them(subject: Subject) -> None:
    model = subject.trained(**{subject.method.layer_dropout: 0.9}).train()
    plain = subject.output(model.eval())
    assert not torch.allclose(subject.output(model.train()), plain)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(subject.output(model), plain)
