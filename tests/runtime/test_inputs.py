"""What a layer's input is kept as for backward: nothing new where autograd keeps what it was made of, and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peftc import plugin as api
from peftc.ops import inputs, linear, lowrank
from peftc.ops.linear import linear_low_rank
from peftc.ops.lowrank import Noise
from tests.defects import put_defect
from tests.runtime.methods import NarrowConfig, NarrowTuner, adapted
from tests.runtime.test_lowrank import SCALE, tensors
from tests.unit.fakes import registered

#: what a layer before makes of the tensors `u` and `v` `(2, 4, 8)` and the frozen vector `g`
Before = Callable[[Tensor, Tensor, Tensor], Tensor]


def rms_norm(u: Tensor, g: Tensor, narrow: torch.dtype | None = None) -> Tensor:
    wide = u.to(torch.float32) if narrow is not None else u
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return g * (normed if narrow is None else normed.to(narrow))


def moved(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.add_(1)


#: inputs that need not be kept, and those that are
MADE: dict[str, Before] = {
    "a product": lambda u, v, g: F.silu(u) * v,
    "a product with a number": lambda u, v, g: (u * v) * 0.5,
    "a product with a frozen vector": lambda u, v, g: (u * v) * g,
    "a product with itself": lambda u, v, g: u * u,
    "a product of leaves": lambda u, v, g: u * g * v,
    "a norm": lambda u, v, g: rms_norm(u, g),
    "a norm around one": lambda u, v, g: rms_norm(u, 1.0 + g),
    "gelu": lambda u, v, g: F.gelu(u * 1.5),
    "gelu by tanh": lambda u, v, g: F.gelu(u * 1.5, approximate="tanh"),
    "silu": lambda u, v, g: F.silu(u + v),
    "a layer norm": lambda u, v, g: F.layer_norm(u + v, (8,), g, g / 2),
    "a layer norm without a weight": lambda u, v, g: F.layer_norm(u + v, (8,)),
    "another view": lambda u, v, g: (u * v).view(4, 2, 8),
}
KEPT: dict[str, Before] = {
    "a sum": lambda u, v, g: u + v,
    "a detached product": lambda u, v, g: (u * v).detach(),
    "a product that was written into": lambda u, v, g: (u * v).add_(g),
    "a product that was written into without a history": lambda u, v, g: moved(u * v),
    "a part of a product": lambda u, v, g: (u * v)[:, :2],
}
ALL = MADE | KEPT


def leaves() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    own = {name: torch.randn(2, 4, 8, generator=generator, dtype=torch.float64) for name in ("u", "v")}
    given = tensors(2, 4) | own | {"g": torch.randn(8, generator=generator, dtype=torch.float64)}
    return {name: tensor.requires_grad_(name in ("u", "v", "A", "B")) for name, tensor in given.items()}


def formula(x: Tensor, w: dict[str, Tensor], noise: Noise | None = None) -> Tensor:
    own = x if noise is None else x * noise.values
    return F.linear(x, w["W"], w["b"]) + SCALE * (own @ w["A"].t() @ w["B"].t())


def fused(x: Tensor, w: dict[str, Tensor], noise: Noise | None = None) -> Tensor:
    return linear_low_rank(x, w["W"], w["b"], w["A"], w["B"], SCALE, noise)


def beside(x: Tensor, w: dict[str, Tensor], noise: Noise | None = None) -> Tensor:
    return lowrank.add_low_rank(F.linear(x, w["W"], w["b"]), x, w["A"], w["B"], SCALE, noise)


WAYS = {"fused": fused, "beside": beside}


def gradients(before: Before, way: Callable[..., Tensor], *, twice: bool = False, p: float = 0.0) -> dict[str, Any]:
    """Of all leaves, where two layers read the input, with dropout or not; of second derivatives, if `twice`."""
    w = leaves()
    trained = {name: tensor for name, tensor in w.items() if tensor.requires_grad}
    x = before(w["u"], w["v"], w["g"])
    torch.manual_seed(3)
    noise = Noise.of(x, p) if p else None
    loss = way(x, w, noise).square().sum() + way(x, w, noise).cos().sum()
    found = torch.autograd.grad(loss, list(trained.values()), create_graph=twice, allow_unused=True)
    if twice:
        moved = sum(grad.sin().sum() for grad in found if grad is not None)
        assert isinstance(moved, Tensor)
        found = torch.autograd.grad(moved, list(trained.values()), allow_unused=True)
    return dict(zip(trained, found, strict=True))


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, tensor in wanted.items():
        assert (found[name] is None) is (tensor is None), name
        if tensor is not None:
            torch.testing.assert_close(found[name], tensor, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("before", ALL.values(), ids=ALL)
def test_gradients_are_those_of_the_formula(before: Before, way: Callable[..., Tensor], twice: bool, p: float) -> None:
    same(gradients(before, way, twice=twice, p=p), gradients(before, formula, twice=twice, p=p))


@pytest.mark.parametrize("name", ALL)
def test_the_input_is_let_go_where_it_can_be_made_again(name: str) -> None:
    w = leaves()
    x = ALL[name](w["u"], w["v"], w["g"])
    y = fused(x, w)
    assert y.grad_fn is not None
    saved = [t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[attr-defined]
    assert (x.data_ptr() in saved) is (name in KEPT)


def test_inputs_in_half_precision_are_made_again_bit_for_bit() -> None:
    u = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    x = rms_norm(u * 1, torch.randn(8, dtype=torch.bfloat16), narrow=torch.bfloat16)
    found = inputs._making(x)
    assert found is not None
    make, parts = found
    assert torch.equal(make(iter(parts)), x)
    assert all(part.dtype is not torch.bfloat16 or part.dim() == 1 for part in parts)


def test_the_input_itself_is_differentiated_twice() -> None:
    """Who has the input may ask for derivatives by it: they are not lost on the tensors that it was made of."""

    def by_input(way: Callable[..., Tensor]) -> Tensor:
        w = leaves()
        x = w["u"] * w["v"]
        (grad,) = torch.autograd.grad(way(x, w).pow(3).sum(), [w["A"]], create_graph=True)
        (again,) = torch.autograd.grad(grad.square().sum(), [x])
        return again

    torch.testing.assert_close(by_input(fused), by_input(formula))


def test_graphs_are_run_twice_and_in_part() -> None:
    def run(way: Callable[..., Tensor]) -> list[Tensor]:
        w = leaves()
        x = w["u"] * w["v"]
        first, second = way(x, w), way(x, w)
        found = list(torch.autograd.grad(first.sum(), [w["A"], w["u"]], retain_graph=True))
        for _ in range(2):
            found += torch.autograd.grad((first * second).sum(), [w["A"], w["u"]], retain_graph=True)
        return found

    torch.testing.assert_close(run(fused), run(formula))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_before_and_after(reentrant: bool) -> None:
    """What a checkpoint keeps may be taken once only: not by an input that is made again of it."""

    calls: list[str] = []

    def run(how: str) -> dict[str, Any]:
        w = leaves()

        def first(u: Tensor, v: Tensor) -> Tensor:
            calls.append(how)
            return F.silu(u) * v

        def both(u: Tensor, v: Tensor) -> Tensor:
            return fused(first(u, v), w)

        again = {"use_reentrant": reentrant}
        if how == "around":
            y = checkpoint(both, w["u"], w["v"], **again)
        elif how == "before":
            y = fused(checkpoint(first, w["u"], w["v"], **again), w)
        elif how == "after":
            y = checkpoint(fused, first(w["u"], w["v"]), w, **again)
        else:
            y = both(w["u"], w["v"])
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        return {name: tensor.grad for name, tensor in w.items()}

    wanted = run("not at all")
    for how in ("around", "before", "after"):
        same(run(how), wanted)
    assert [calls.count(how) for how in ("around", "before", "after")] == [2, 2, 1]


def test_with_hooks_the_input_is_what_they_pack() -> None:
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor

    w = leaves()
    x = w["u"][:1] * w["v"][:1]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(x, w)
    assert (1, 4, 8) in packed
    assert len(packed) == 5  # with the weight, A, B and what is between them


def test_an_operand_that_was_written_into_is_told_of_by_backward() -> None:
    w = leaves()
    u = w["u"] * 1
    x = u * w["v"]
    u.add_(1)
    y = fused(x, w)  # goes on, as without an adapter
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_layers_that_share_an_input_make_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[None] = []
    monkeypatch.setattr(
        inputs, "_then", lambda change, found: (lambda t: (made.append(None), change(found[0](t)))[1], found[1])
    )
    w = leaves()
    for _ in range(2):
        x = F.gelu(w["u"] * 1)
        y = sum(fused(x, w) for _ in range(3))
        assert isinstance(y, Tensor)
        y.sum().backward()
    assert len(made) == 2


def test_dropout_keeps_a_byte_for_each_number() -> None:
    w = leaves()
    x = F.silu(w["u"]) * w["v"]
    y = fused(x, w, Noise.of(x, 0.4))
    assert y.grad_fn is not None
    saved = [t for t in y.grad_fn.saved_tensors if t.shape == x.shape]  # type: ignore[attr-defined]
    assert [t.dtype for t in saved].count(torch.bool) == 1
    assert x.data_ptr() not in [t.data_ptr() for t in saved]


class DropConfig(NarrowConfig):
    """Options of a thin update that drops inputs."""

    peft_type: api.PeftType | None = api.PeftType("DROPS")
    p: float = 0.0


class DropTuner(NarrowTuner):
    dropout_option = "p"


@pytest.mark.parametrize("half", [False, True], ids=["one dtype", "half a base"])
@pytest.mark.parametrize("hooked", ["", "dropout", "base"])
def test_dropout_draws_what_the_module_would(half: bool, hooked: str) -> None:
    with registered(
        api.TunerMethod("DROPS", DropConfig, DropTuner(), prefix="narrow_", layer_names=("narrow_A", "narrow_B"))
    ):
        model = adapted(DropConfig(target_modules=["first"], p=0.5)).train()
    layer = model.get_base_model().first
    if half:
        layer.base_layer.bfloat16()
    dropout = getattr(layer, layer.dropout_name)["default"]
    if hooked:
        (dropout if hooked == "dropout" else layer.base_layer).register_forward_hook(lambda *args: None)
    x = torch.randn(3, 8).to(layer.base_layer.weight.dtype)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    own = nn.Dropout(0.5)(x).to(torch.float32)
    A, B = layer.narrow_A["default"].weight, layer.narrow_B["default"].weight
    wanted = layer.base_layer(x) + (own @ A.t() @ B.t() * 0.5)
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-2 if half else 1e-5, atol=1e-2 if half else 1e-5)


def _make_it_once() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_layers_that_share_an_input_make_it_once(patch)


DEFECTS: dict[str, tuple[Any, str, str, Callable[[], None]]] = {
    "hooks": (inputs, '.unpack_hook is not None:\n        return None', '.unpack_hook is not None:\n        pass', lambda: test_checkpoints_around_before_and_after(False)),
    "hooks around": (inputs, " or _top_saved_tensors_default_hooks(False) is not None", "", test_with_hooks_the_input_is_what_they_pack),
    "own input": (inputs, "own = self._input()\n", "own = None\n", test_the_input_itself_is_differentiated_twice),
    "shared": (inputs, "kept.uses += 1", "kept.uses = 1", _make_it_once),
    "written into": (inputs, " or x._version", "", lambda: test_gradients_are_those_of_the_formula(KEPT["a product that was written into without a history"], fused, False, 0.0)),
    "order": (inputs, "(one, parts), (other, more) = first, second", "(one, parts), (other, more) = first, first", lambda: test_gradients_are_those_of_the_formula(MADE["a product"], fused, False, 0.0)),
    "noise": (linear, "own = x if kept is None else", "own = x if True else", lambda: test_gradients_are_those_of_the_formula(MADE["a product"], fused, False, 0.4)),
    "noise of x": (lowrank, "grad_x = left(grad_x, kept, ctx.factor)", "pass", lambda: test_gradients_are_those_of_the_formula(KEPT["a sum"], beside, False, 0.4)),
}  # fmt: skip


@pytest.mark.parametrize("case", DEFECTS.values(), ids=DEFECTS)
def test_a_test_notices(case: tuple[Any, str, str, Callable[[], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, test = case
    put_defect(monkeypatch, module, old, new)
    with pytest.raises((Exception, pytest.fail.Exception)):
        test()
