"""Layers that read one input are computed together where they were seen to, and each gives what it gives by itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from threading import Thread
from typing import Any
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftc import PeftModel, get_peft_model
from peftc.ops import joint, linear
from peftc.runtime.layer import paths
from tests.defects import put_defect
from tests.runtime.methods import narrow

NAMES = ("q", "k", "v")


class Block(nn.Module):
    """Three layers of one input; what they are called with, and how, can be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, out, bias=bias) for out, bias in ((6, True), (4, False), (6, True)))
        self.before: Callable[[Tensor], Tensor] = F.silu
        self.between: Callable[[str, Tensor], Tensor] = lambda name, x: x
        self.call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def forward(self, u: Tensor) -> dict[str, Tensor]:
        x = self.before(u)
        return {name: self.call(getattr(self, name), self.between(name, x)) for name in NAMES}


def block(**options: Any) -> tuple[PeftModel, Block, Tensor]:
    """An adapted block that was called once, so that it was seen which layers share an input; and an input."""
    torch.manual_seed(0)
    model = get_peft_model(Block().double(), narrow(**{"target_modules": list(NAMES), **options})).double()
    inner = model.get_base_model()
    assert isinstance(inner, Block)
    u = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    model.train()(u)
    return model, inner, u


def together(found: dict[str, Tensor]) -> str:
    """Which layers were computed together."""
    return "".join(name for name, y in found.items() if y.grad_fn is not None and "Joint" in y.grad_fn.name())


def trained(model: PeftModel, u: Tensor) -> dict[str, Tensor]:
    return {"u": u} | {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(found: dict[str, Tensor], names: str = "qkv") -> Tensor:
    return sum((found[name].sin().sum() for name in names), torch.zeros((), dtype=torch.float64))


# what is done with the outputs ----------------------------------------------------------------------------------------


def backward(model: PeftModel, u: Tensor, names: str = "qkv") -> list[Any]:
    of = trained(model, u)
    loss_of(model(u), names).backward()
    return [tensor.grad for tensor in of.values()]


def in_part(model: PeftModel, u: Tensor) -> list[Any]:
    return backward(model, u, "qv")


def only_a_follower(model: PeftModel, u: Tensor) -> list[Any]:
    return backward(model, u, "k")


def twice(model: PeftModel, u: Tensor) -> list[Any]:
    return twice_in_part(model, u, "qkv")


def twice_in_part(model: PeftModel, u: Tensor, names: str = "kv") -> list[Any]:
    of = list(trained(model, u).values())
    found = torch.autograd.grad(loss_of(model(u), names), of, create_graph=True, allow_unused=True)
    return [*found, *torch.autograd.grad(sum(g.cos().sum() for g in found if g is not None), of, allow_unused=True)]


def kept_graph(model: PeftModel, u: Tensor) -> list[Any]:
    of, found = list(trained(model, u).values()), model(u)
    grads: list[Any] = []
    for names in ("qkv", "v", "qk"):
        grads += torch.autograd.grad(loss_of(found, names), of, retain_graph=True, allow_unused=True)
    return grads


def some_factors(model: PeftModel, u: Tensor) -> list[Any]:
    of = trained(model, u)
    for name, tensor in of.items():
        tensor.requires_grad_(name == "u" or ("k" in name.split(".") and "narrow_A" in name) or "v.narrow_B" in name)
    loss_of(model(u)).backward()
    return [tensor.grad for tensor in of.values()]


def written_output(model: PeftModel, u: Tensor) -> list[Any]:
    of, found = trained(model, u), model(u)
    found["k"].mul_(2)
    F.relu_(found["q"][0])
    loss_of(found).backward()
    return [tensor.grad for tensor in of.values()]


OPERATIONS: dict[str, Callable[[PeftModel, Tensor], list[Any]]] = {
    "backward": backward,
    "in part": in_part,
    "only a follower": only_a_follower,
    "twice": twice,
    "twice in part": twice_in_part,
    "a kept graph": kept_graph,
    "some factors train": some_factors,
    "an output is written into": written_output,
}

# what the block is in -------------------------------------------------------------------------------------------------


def state_of_layers(change: Callable[[Block], Any]) -> Callable[[PeftModel, Block], Any]:
    return lambda model, inner: change(inner)


def another_input(inner: Block) -> None:
    inner.between = lambda name, x: x * 2 if name == "k" else x


def written_into(inner: Block) -> None:
    """The input, between two layers, without a history."""

    def write(name: str, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.mul_(2) if name == "k" else x

    inner.between = write


def unfrozen(inner: Block) -> None:
    inner.k.get_base_layer().weight.requires_grad_()  # type: ignore[operator]


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, y: y * 2)


def checkpointed(inner: Block) -> None:
    inner.call = lambda layer, x: checkpoint(layer, x, use_reentrant=False) if layer is inner.k else layer(x)


#: and which layers are computed together then
STATES: dict[str, tuple[Callable[[PeftModel, Block], Any], str]] = {
    "as it was": (lambda model, inner: None, "qkv"),
    "in evaluation": (lambda model, inner: model.eval(), "qkv"),
    "other factors": (lambda model, inner: factors_anew(model), ""),
    "another scale": (lambda model, inner: inner.v.scale_layer(2.0), "qk"),  # type: ignore[operator]
    "without the adapter in one": (state_of_layers(lambda inner: inner.k.enable_adapters(False)), "qv"),
    "another input": (state_of_layers(another_input), "qv"),
    "an input that is written into": (state_of_layers(written_into), "q"),
    "a layer that trains": (state_of_layers(unfrozen), ""),
    "a hook of a layer": (state_of_layers(lambda inner: hook(inner.k)), ""),
    "a hook of a base": (state_of_layers(lambda inner: hook(inner.k.get_base_layer())), ""),  # type: ignore[operator]
    "an input that is kept": (lambda model, inner: setattr(inner, "before", lambda u: u + 1), ""),
    "a leaf": (lambda model, inner: setattr(inner, "before", lambda u: u), ""),
    "a checkpoint of one": (state_of_layers(checkpointed), "qv"),
}


def factors_anew(model: PeftModel) -> None:
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.requires_grad:
                setattr(module, name, nn.Parameter(p.detach() * 2))


def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(seat: Any, x: Tensor, layer: joint.Layer) -> Tensor:
        return joint.linear_low_rank(x, *layer)

    monkeypatch.setattr(paths, "joint_low_rank", alone)


def outcome(state: str, operation: str) -> list[Any]:
    model, inner, u = block()
    STATES[state][0](model, inner)
    found = [y.detach().clone() for y in model(u).values()] if state == "as it was" else []
    return [*found, *OPERATIONS[operation](model, u)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("state", STATES)
def test_each_layer_gives_what_it_gives_by_itself(state: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcome(state, operation)
    by_itself(monkeypatch)
    wanted = outcome(state, operation)
    assert [t is None for t in found] == [t is None for t in wanted]
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("state", STATES)
def test_which_layers_are_computed_together(state: str) -> None:
    model, inner, u = block()
    change, expected = STATES[state]
    change(model, inner)
    assert together(model(u)) == expected


@pytest.mark.parametrize("how", ["a checkpoint", "an old checkpoint", "hooks of what is kept"])
def test_checkpoints_find_the_same_again(how: str) -> None:
    """Seen in the first run and known in the second: neither may compute together what the other does not."""

    def run(how: str) -> list[Any]:
        model, _, u = block()
        fresh = get_peft_model(Block().double(), narrow(target_modules=list(NAMES))).double()
        fresh.load_state_dict(model.state_dict())
        of, found = trained(fresh, u), dict[str, Tensor]()
        if how == "hooks of what is kept":
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                fresh(u)
                found = fresh(u)
            assert together(found) == ""
        elif how:
            values = checkpoint(lambda u: tuple(fresh(u).values()), u, use_reentrant=how == "an old checkpoint")
            assert isinstance(values, tuple)
            found = dict(zip(NAMES, values, strict=True))
        else:
            found = fresh(u)
        loss_of(found).backward()
        return [tensor.grad for tensor in of.values()]

    for one, other in zip(run(how), run(""), strict=True):
        torch.testing.assert_close(one, other)


def test_without_gradients_nothing_is_computed_together() -> None:
    model, _, u = block()
    with torch.no_grad():
        assert together(model(u)) == ""


def test_what_nobody_takes_dies_with_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """And when it was left for the third time, each layer computes for itself."""
    model, inner, u = block()
    made: list[Any] = []
    init = joint._Round.__init__

    def noting(self: Any, leader: Any, x: Tensor, outputs: Any) -> None:
        made.extend(ref(y) for _, _, y in outputs.values())
        init(self, leader, x, outputs)

    monkeypatch.setattr(joint._Round, "__init__", noting)
    for _ in range(3):
        assert together(model(u)) in ("qkv", "")  # known, or seen once more
        x = F.silu(u)
        made.clear()
        inner.q(x)
        assert len(made) == 2
        del x
        assert all(y() is None for y in made)
    for _ in range(2):
        assert together(model(u)) == ""


def test_no_layer_outlives_its_model() -> None:
    model, inner, u = block()
    assert together(model(u)) == "qkv"
    layer = ref(inner.q)
    del model, inner
    gc.collect()
    assert layer() is None


def test_threads_share_nothing() -> None:
    """An output that one thread computed for the next layer is not another's, even of the same input."""
    _, inner, u = block()
    x = F.silu(u)
    found = {"q": inner.q(x)}
    thread = Thread(target=lambda: found.update(k=inner.k(x)))
    thread.start()
    thread.join()
    assert together(found) == "q"
    found["k"] = inner.k(x)
    assert together(found) == "qk"


#: defect -> state and operation that tell
DEFECTS: dict[tuple[str, str], tuple[str, str]] = {
    ("self._version != x._version or", "False or"): ("an input that is written into", "backward"),
    ("self._input() is not x", "False"): ("another input", "backward"),
    ("if state != layer.state():", "if False:"): ("another scale", "backward"),
    ("if is_hooked():", "if False:"): ("a checkpoint of one", "together"),
    ("not is_unwatched(self._owner) or ", ""): ("a hook of a layer", "together"),
    ("or not is_bare(self._base, x)", ""): ("a hook of a base", "together"),
    ("or not is_made_again(x)", ""): ("an input that is kept", "together"),
    ("            if grad is None:\n                continue", "            if grad is None:\n                break"): (
        "as it was",
        "only a follower",
    ),
    ("grad_x.addmm_(rows, weights[n])", "grad_x"): ("as it was", "backward"),
    ("ctx.scales[n], False", "1.0, False"): ("as it was", "backward"),
    ("firsts[n] for n in of_h", "firsts[0] for n in of_h"): ("as it was", "in part"),
    ("one.clone() if need[n] else None", "None"): ("as it was", "some factors train"),
}


@pytest.mark.parametrize(("defect", "told"), DEFECTS.items(), ids=[before.strip() for before, _ in DEFECTS])
def test_the_tables_tell(defect: tuple[str, str], told: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, joint, *defect)
    state, operation = told
    with pytest.raises((AssertionError, RuntimeError)):
        if operation == "together":
            test_which_layers_are_computed_together(state)
        else:
            test_each_layer_gives_what_it_gives_by_itself(state, operation, monkeypatch)


@pytest.mark.parametrize("state", ["as it was", "an input that is kept"])
def test_outputs_are_no_views(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bias torch gives one, and lets nobody write into a view that came out of a function."""
    outcome(state, "an output is written into")
    put_defect(monkeypatch, linear, "if y._is_view() else y", "if False else y")
    with pytest.raises(RuntimeError, match="modified inplace"):
        outcome(state, "an output is written into")


def test_a_factor_that_is_written_into_between_two_layers() -> None:
    """The output is that of the new factor. Backward does not use the old one unseen: torch says that it is no longer there."""
    model, inner, u = block()

    def write(name: str, x: Tensor) -> Tensor:
        if name == "k":
            with torch.no_grad():
                next(p for n, p in inner.k.named_parameters() if "narrow_B" in n).mul_(1.5)
        return x

    inner.between = write
    found = model(u)
    assert together(found) == "qv"
    torch.testing.assert_close(found["k"], inner.k(F.silu(u)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(found).backward()
