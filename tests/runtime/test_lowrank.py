"""The fused low-rank update is the plain formula: values, gradients, dtypes; and it never writes where others look."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.modules.module import register_module_forward_hook

from peftc.ops import linear
from peftc.ops.linear import linear_low_rank
from peftc.ops.lowrank import add_low_rank
from tests.defects import put_defect
from tests.runtime.methods import adapted, narrow, x

IN, OUT, RANK, SCALE = 8, 6, 3, 0.7
NAMES = ("x", "W", "b", "A", "B")

Update = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The formula, in the factors' dtype and rounded once."""
    return (y + scale * (x.to(A.dtype) @ A.t() @ B.t())).to(y.dtype)


def tensors(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Input, base weight and bias, factors."""
    sizes = {"x": (*shape, IN), "W": (OUT, IN), "b": (OUT,), "A": (RANK, IN), "B": (OUT, RANK)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()}


def call(update: Update, given: dict[str, Tensor]) -> Tensor:
    """The layer with the update, on the output of a base that has a bias."""
    y = F.linear(given["x"], given["W"], given["b"])
    return update(y, given["x"], given["A"], given["B"], SCALE)


def values_and_gradients(update: Update, given: dict[str, Tensor], frozen: str = "") -> dict[str, Tensor | None]:
    leaves = {name: tensor.detach().requires_grad_(name not in frozen) for name, tensor in given.items()}
    y = call(update, leaves)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], **tolerance: float) -> None:
    assert [n for n, t in found.items() if t is None] == [n for n, t in wanted.items() if t is None]
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (1, 1), (2, 4), (2, 1, 3)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    given = tensors(*shape)
    assert_same(values_and_gradients(add_low_rank, given), values_and_gradients(plain, given))


@pytest.mark.parametrize("frozen", ["x", "W b", "A", "B", "A B", "x W b", "x W b A", "x W b B"])
def test_only_what_trains_gets_a_gradient(frozen: str) -> None:
    given = tensors(2, 4)
    found = values_and_gradients(add_low_rank, given, frozen)
    assert_same(found, values_and_gradients(plain, given, frozen))
    assert [name for name in NAMES if found[name] is None] == frozen.split()


@pytest.mark.parametrize(
    "layout", [lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t[:, :1].expand(-1, 3, -1)]
)
def test_an_input_that_is_not_contiguous(layout: Callable[[Tensor], Tensor]) -> None:
    given = tensors(4, 6)
    given["x"] = layout(given["x"])
    assert not given["x"].is_contiguous()
    assert_same(values_and_gradients(add_low_rank, given), values_and_gradients(plain, given))
    with torch.no_grad():
        torch.testing.assert_close(call(add_low_rank, given), call(plain, given))


def test_numerical_gradients() -> None:
    given = {name: tensor.requires_grad_() for name, tensor in tensors(2, 2).items()}
    assert torch.autograd.gradcheck(
        lambda *leaves: call(add_low_rank, dict(zip(NAMES, leaves, strict=True))), list(given.values())
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,), (2, 4), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_without_gradients_it_adds_in_place(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = tensors(*shape, dtype=dtype)
    with torch.no_grad():
        y = F.linear(given["x"], given["W"], given["b"])
        out = add_low_rank(y, given["x"], given["A"], given["B"], SCALE)
        assert out is y
        tolerance = {"rtol": 0.05, "atol": 0.1} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(out, call(plain, given), **tolerance)


@pytest.mark.parametrize("shape", [(1,), (2, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_half_precision_base_and_full_precision_factors(shape: tuple[int, ...], training: bool) -> None:
    given = tensors(*shape, dtype=torch.float32)
    given |= {name: given[name].bfloat16() for name in ("x", "W", "b")}
    if not training:
        with torch.no_grad():
            found, wanted = call(add_low_rank, given), call(plain, given)
            assert found.dtype is torch.bfloat16
            torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)  # one rounding of the update more or less
        return
    found = values_and_gradients(add_low_rank, given)
    assert {name: tensor.dtype for name, tensor in found.items() if tensor is not None} == {
        "y": torch.bfloat16, "x": torch.bfloat16, "W": torch.bfloat16, "b": torch.bfloat16, "A": torch.float32, "B": torch.float32,
    }  # fmt: skip
    assert_same(found, values_and_gradients(plain, given), rtol=0.02, atol=0.02)


def test_under_autocast() -> None:
    given = tensors(2, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(add_low_rank, given)
    assert found["y"].dtype is torch.bfloat16
    assert all(found[name].dtype is torch.float32 for name in NAMES)
    exact = values_and_gradients(plain, given)
    exact["y"] = exact["y"].bfloat16()
    assert_same(found, exact, rtol=0.05, atol=0.1)


def test_numerical_second_derivatives() -> None:
    given = {name: tensor.requires_grad_() for name, tensor in tensors(2, 2).items()}
    assert torch.autograd.gradgradcheck(
        lambda *leaves: call(add_low_rank, dict(zip(NAMES, leaves, strict=True))), list(given.values())
    )


# in a layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_hook_on_the_base_layer_keeps_what_the_base_said(training: bool) -> None:
    model = adapted(narrow(target_modules=["first"]))
    base = model.get_base_model().first.base_layer
    kept: list[Tensor] = []
    handle = base.register_forward_hook(lambda module, args, y: kept.append(y))
    with torch.set_grad_enabled(training):
        hooked = model(x())
    handle.remove()
    assert torch.equal(kept[0], base(x()))
    assert torch.equal(hooked, model(x()))


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_on_the_base_layer(kind: str) -> None:
    model = adapted(narrow(target_modules=["first"]))
    seen: list[object] = []
    getattr(model.get_base_model().first.base_layer, kind)(lambda module, *grads: seen.append(grads) and None)
    model(x().requires_grad_()).sum().backward()
    assert seen


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_hook_on_every_module_keeps_what_the_base_said(training: bool) -> None:
    model = adapted(narrow(target_modules=["first"]))
    base = model.get_base_model().first.base_layer
    kept: list[Tensor] = []
    handle = register_module_forward_hook(lambda module, args, y: kept.append(y) if module is base else None)
    try:
        with torch.set_grad_enabled(training):
            model(x())
    finally:
        handle.remove()
    assert torch.equal(kept[0], base(x()))


def test_gradients_per_sample_by_transforms() -> None:
    model = adapted(narrow(target_modules=["first"]))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row,)).square().sum()

    each = vmap(grad(loss), (None, 0))(trained, x())
    loss({name: p for name, p in model.named_parameters() if p.requires_grad}, x()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[name].sum(0), parameter.grad)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_what_the_base_does_not_take_is_not_passed_over(training: bool) -> None:
    model = adapted(narrow(target_modules=["first"]))
    with torch.set_grad_enabled(training), pytest.raises(TypeError, match="adapter_names"):
        model.get_base_model().first(x(), adapter_names=["default"])


def test_a_base_whose_class_is_exchanged_computes_by_it() -> None:
    class Doubling(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = adapted(narrow(target_modules=["first"]))
    layer = model.get_base_model().first
    before, base = layer(x()), layer.base_layer(x())
    layer.base_layer.__class__ = Doubling
    torch.testing.assert_close(layer(x()), before + base)


def test_two_active_adapters_add_up() -> None:
    model = adapted(narrow(target_modules=["first"]), other=narrow(target_modules=["first"], r=3))
    model.set_adapter(["default", "other"])
    layer = model.get_base_model().first
    wanted = layer.base_layer(x()) + sum(
        0.5 * x() @ layer.narrow_A[name].weight.t() @ layer.narrow_B[name].weight.t() for name in ("default", "other")
    )
    torch.testing.assert_close(layer(x()), wanted)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x()).sum(), layer.narrow_B["default"].weight),
        torch.autograd.grad(wanted.sum(), layer.narrow_B["default"].weight),
    )


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_layer_in_training_is_the_plain_formula(bias: str) -> None:
    model = adapted(narrow(target_modules=["first"], bias=bias)).double()
    layer, base = model.get_base_model().first, model.get_base_model().first.base_layer
    given = {
        "x": x().double(),
        "W": base.weight,
        "b": base.bias,
        "A": layer.narrow_A["default"].weight,
        "B": layer.narrow_B["default"].weight,
    }
    trained = [tensor for tensor in given.values() if tensor.requires_grad]
    assert len(trained) == (3 if bias == "all" else 2)
    given["x"].requires_grad_()
    wanted = plain(F.linear(given["x"], given["W"], given["b"]), given["x"], given["A"], given["B"], 0.5)
    found = layer(given["x"])
    torch.testing.assert_close(found, wanted)
    leaves = [given["x"], *trained]
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), leaves), torch.autograd.grad(wanted.square().sum(), leaves)
    )


def test_what_a_layer_with_a_bias_gives_can_be_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bias torch gives a view for inputs of three dimensions, and lets nobody write into a view that came out of a function."""

    def written() -> torch.Tensor:
        leaves = (
            torch.randn(2, 5, 4, requires_grad=True),
            torch.randn(3, 4),
            torch.randn(3),
            torch.randn(2, 4),
            torch.randn(3, 2),
        )
        A, B = (leaf.requires_grad_() for leaf in leaves[3:])
        y = linear_low_rank(*leaves[:3], A, B, 0.5)
        y.mul_(2).sum().backward()
        assert leaves[0].grad is not None
        return y

    written()
    put_defect(monkeypatch, linear, "if y._is_view() else y", "if False else y")
    with pytest.raises(RuntimeError, match="modified inplace"):
        written()
