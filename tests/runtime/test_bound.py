"""The short way of a forward without gradients computes what the general path does, whatever was done to the model between two calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from peftc import PeftModel, get_peft_model
from peftc.plugin import MapTuner, View
from peftc.registry.manager import default_registry
from peftc.runtime.layer import bound, stored
from peftc.runtime.layer.wrapper import TunerLayer
from tests.defects import put_defect
from tests.runtime.methods import NarrowConfig, NarrowTuner, narrow
from tests.unit.fakes import plugin


class Counted(NarrowTuner):
    """The thin update, which counts how often it is asked, and drops inputs in training."""

    asked = 0

    def dropout(self, c: NarrowConfig) -> float:
        return 0.5

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        type(self).asked += 1
        return super().thin(a)


class Sturdy(Counted):
    """The same without dropout: then nothing is watched but the two factors."""

    def dropout(self, c: NarrowConfig) -> float:
        return 0.0


def with_tuner(tuner: MapTuner[Any]) -> None:
    method = default_registry().get("NARROW")
    default_registry().register(plugin(replace(method, tuner=tuner)), "narrow")


def adapted(tuner: MapTuner[Any], **options: Any) -> PeftModel:
    """A linear layer with an adapter that has been called without gradients."""
    with_tuner(tuner)
    torch.manual_seed(3)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), narrow(target_modules=["0"], **options), "one").eval()
    model.add_adapter("two", narrow(target_modules=["0"], r=3))
    for _ in range(2):
        without(model, inputs()[0])
    return model


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One token, and several, in every shape that a linear layer takes."""
    torch.manual_seed(4)
    return [torch.randn(*shape, dtype=dtype) for shape in ((1, 8), (8,), (1, 1, 8), (5, 8), (2, 3, 8), (0, 8))]


def without(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def cells_of(model: nn.Module) -> list[Any]:
    """Where layers keep what they look at on the short way."""
    paths = [module._composed for module in model.modules() if isinstance(module, TunerLayer)]
    found = [(path.__code__.co_freevars, path.__closure__) for path in paths if isinstance(path, FunctionType)]
    return [cell for names, cells in found for name, cell in zip(names, cells or (), strict=True) if name == "held"]


def general(model: nn.Module, x: Tensor) -> Tensor:
    """The general path, as if there were no short way."""
    cells = cells_of(model)
    before = [cell.cell_contents for cell in cells]
    for cell in cells:
        cell.cell_contents = ()
    try:
        return without(model, x)
    finally:
        for cell, held in zip(cells, before, strict=True):
            cell.cell_contents = held


def layer_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, TunerLayer))


def base_of(model: nn.Module) -> Any:
    return layer_of(model).base_layer


def factor_of(model: nn.Module) -> Any:
    return layer_of(model).narrow_A["one"]


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * 3


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Triple(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3


def _patch(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 3


def _triple(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 3


def _triple_input(module: nn.Module, args: Any) -> Any:
    return tuple(each * 3 for each in args)


def _assigned(model: nn.Module) -> None:
    state = {name: nn.Parameter(tensor * 3) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)


def _assign(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 3))


Change = Callable[[Any], Any]
#: what is done, and the defect of the short way by which it would not be seen
CHANGES: dict[str, tuple[Change, tuple[str, str] | None]] = {
    "parameters assigned": (
        _assigned,
        ("*found, *others", "dict(found[0]), *found[1:], *others"),
    ),
    "parameters in place": (_in_place, None),
    "base weight assigned": (lambda m: _assign(base_of(m), "weight"), None),
    "base bias assigned": (lambda m: _assign(base_of(m), "bias"), None),
    "base bias taken": (lambda m: setattr(base_of(m), "bias", None), None),
    "data exchanged": (lambda m: setattr(factor_of(m).weight, "data", factor_of(m).weight.data * 3), None),
    "other rank": (
        lambda m: [
            setattr(layer_of(m).narrow_A["one"], "weight", nn.Parameter(torch.ones(5, 8))),
            setattr(layer_of(m).narrow_B["one"], "weight", nn.Parameter(torch.ones(6, 5))),
        ],
        None,
    ),
    "scale set": (
        lambda m: layer_of(m).set_scale("one", 3.0),
        ('owner["scaling"].get(adapter) if fixed is None else fixed', "0.5"),
    ),
    "scaling written": (
        lambda m: layer_of(m).scaling.update(one=3.0),
        ('owner["scaling"].get(adapter) if fixed is None else fixed', "0.5"),
    ),
    "scaling a tensor": (lambda m: layer_of(m).scaling.update(one=torch.tensor(3.0)), None),
    "scalings exchanged": (
        lambda m: setattr(layer_of(m), "scaling", {"one": 3.0, "two": 1.0}),
        ("vars(view.owner), view", "{'scaling': view.owner.scaling}, view"),
    ),
    "hook on the base": (lambda m: base_of(m).register_forward_hook(_triple), ("any(hooks) or ", "")),
    "hook before the base": (lambda m: base_of(m).register_forward_pre_hook(_triple_input), ("any(hooks) or ", "")),
    "hook on a factor": (lambda m: factor_of(m).register_forward_hook(_triple), ("(base, *hookable)", "(base,)")),
    "hook on the layer": (lambda m: layer_of(m).register_forward_hook(_triple), None),
    "hook of the backward": (lambda m: base_of(m).register_full_backward_hook(lambda *args: None), None),
    "forward of the base": (lambda m: _patch(base_of(m)), (' or "forward" in state:', ":")),
    "forward of a factor": (lambda m: _patch(factor_of(m)), ('"forward" in attributes or ', "")),
    "forward of the other": (lambda m: _patch(layer_of(m).narrow_B["one"]), ('"forward" in attributes2 or ', "")),
    "factor wrapped": (
        lambda m: layer_of(m).narrow_A.update({"one": Wrapper(factor_of(m))}),
        ("home.get(name) is not own or ", ""),
    ),
    "other factor wrapped": (
        lambda m: layer_of(m).narrow_B.update({"one": Wrapper(layer_of(m).narrow_B["one"])}),
        (" or home2.get(name2) is not own2:", ":"),
    ),
    "base of another class": (lambda m: setattr(base_of(m), "__class__", Tripled), ("type(base) is nn.Linear", "True")),
    "base parametrized": (lambda m: parametrize.register_parametrization(base_of(m), "weight", Triple()), None),
    "base's bias parametrized": (
        lambda m: parametrize.register_parametrization(base_of(m), "bias", Triple()),
        ('type(base) is nn.Linear and type(weight) in _ORDINARY and "bias" in parameters', "True"),
    ),
    "factor parametrized": (lambda m: parametrize.register_parametrization(factor_of(m), "weight", Triple()), None),
    "base pruned": (lambda m: prune.l1_unstructured(base_of(m), "weight", 0.5), None),
    "factor pruned": (lambda m: prune.l1_unstructured(factor_of(m), "weight", 0.5), None),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), None),
    "merged": (lambda m: m.merge_adapter(), None),
    "another active": (lambda m: m.set_adapter("two"), None),
    "several active": (lambda m: m.base_model.set_adapter(["one", "two"]), None),
    "deleted": (lambda m: [m.delete_adapter("one"), m.set_adapter("two")], None),
    "rows named": (lambda m: m(torch.randn(2, 8), adapter_names=["one", "two"]), None),
    "in training": (lambda m: m.train(), ("dropout is not None and dropout.training", "False")),
    "dropouts asked for": (lambda m: [layer_of(m).dropouts(), m.train()], None),
}
#: those after which the output is the same; and those that matter where something is dropped
SAME = {"hook of the backward", "merged", "rows named"}
TRAINS = {"in training", "dropouts asked for"}
EACH = pytest.mark.parametrize("change", CHANGES)
TUNERS = pytest.mark.parametrize("tuner", [Counted(), Sturdy()], ids=["drops", "sturdy"])


def compare(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    for _ in range(2):
        for x in inputs(dtype):
            torch.testing.assert_close(without(model, x), general(model, x), rtol=0, atol=0)


@TUNERS
@EACH
def test_what_is_done_between_calls_is_seen(tuner: MapTuner[Any], change: str) -> None:
    model = adapted(tuner)
    before = without(model, inputs()[0])
    compare(model)
    CHANGES[change][0](model)
    compare(model)
    same = change in SAME or (change in TRAINS and type(tuner) is Sturdy)
    assert torch.allclose(without(model, inputs()[0]), before, atol=1e-5) is same


@pytest.mark.parametrize("change", [name for name, (_, defect) in CHANGES.items() if defect is not None])
def test_it_would_be_missed(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    do, defect = CHANGES[change]
    assert defect is not None
    put_defect(monkeypatch, bound, *defect)
    model = adapted(Counted() if change in TRAINS else Sturdy())
    do(model)
    with pytest.raises((AssertionError, RuntimeError, TypeError, KeyError)):
        compare(model)


def test_a_global_hook_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> bool:
        model, outputs = adapted(Sturdy()), []
        with register_module_forward_hook(lambda module, args, out: outputs.append(out)):
            without(model, inputs()[0])
        return any(out is not outputs[-1] for out in outputs)

    assert found()
    put_defect(monkeypatch, bound, " or any(GLOBAL_FORWARD_HOOKS)", "")
    assert not found()


def test_the_method_is_asked_once() -> None:
    model = adapted(Sturdy())
    asked = Sturdy.asked
    for x in inputs():
        without(model, x)
    assert Sturdy.asked == asked
    general(model, inputs()[0])
    assert Sturdy.asked == asked + 1
    with torch.enable_grad():
        for x in inputs():
            torch.testing.assert_close(without(model, x), model(x).detach(), rtol=1e-5, atol=1e-5)


class Lifted(Sturdy):
    """Computes in single precision, whatever the factors are stored in."""

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        return a.narrow_A.float(), a.narrow_B.float(), a.scaling


def test_other_dtypes_are_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for tuner in (Sturdy(), Lifted()):
        for dtype in (torch.bfloat16, torch.float64):
            model = adapted(tuner)
            compare(model.to(dtype), dtype)
    model = adapted(Sturdy())
    base_of(model).to(torch.bfloat16)  # the factors are not
    compare(model, torch.bfloat16)
    put_defect(monkeypatch, bound, "A.dtype is not dtype or B.dtype is not dtype", "False")
    with pytest.raises((AssertionError, RuntimeError)):
        compare(adapted(Lifted()).to(torch.bfloat16), torch.bfloat16)


class ByConfig(Sturdy):
    """Reads its options, which may be exchanged."""

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        return a.narrow_A, a.narrow_B, a.config.factor


class ByMode(Sturdy):
    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        return a.narrow_A, a.narrow_B, 2.0 if a.training else 1.0


class Doubled(Sturdy):
    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        return a.narrow_A, a.narrow_B, 2 * a.scaling


class Turned(Sturdy):
    """Computes a factor from another's numbers."""

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        return a.narrow_A.roll(1, 0), a.narrow_B, a.scaling


class Constant(Sturdy):
    """Has a scale of its own, which never changes, and finds slots by label."""

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        return a["narrow_A"], a["narrow_B"], 1


def changed(model: PeftModel) -> None:
    model.train()
    layer_of(model).set_scale("one", 3.0)
    layer_of(model).part("one").view.config = narrow(factor=7.0)
    _in_place(model)


@pytest.mark.parametrize(
    "tuner", [ByConfig(), ByMode(), Doubled(), Turned(), Constant()], ids=lambda t: type(t).__name__
)
def test_what_a_method_reads_beside_its_factors_stays_live(tuner: MapTuner[Any]) -> None:
    model = adapted(tuner)
    assert bool(cells_of(model)[0].cell_contents) is isinstance(tuner, Constant)
    compare(model)
    changed(model)
    compare(model)


@pytest.mark.parametrize("tuner", [ByConfig(), ByMode(), Doubled()], ids=lambda t: type(t).__name__)
def test_reading_more_would_be_missed(tuner: MapTuner[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, stored, "and self._read <= settled", "")
    model = adapted(tuner)
    changed(model)
    with pytest.raises(AssertionError):
        compare(model)


@TUNERS
def test_copies_are_bound_for_themselves(tuner: MapTuner[Any]) -> None:
    model = adapted(tuner)
    wanted = without(model, inputs()[0])
    copied = copy.deepcopy(model)
    _in_place(model)
    compare(copied)
    assert torch.equal(without(copied, inputs()[0]), wanted)


def test_other_ways_to_call_it() -> None:
    model = adapted(Sturdy())
    x = inputs()[3]
    wanted = without(model, x)
    tripled = {name: tensor.detach() * 3 for name, tensor in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(model(input=x), wanted)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), wanted)
        torch.testing.assert_close(torch.jit.trace(layer_of(model), x, check_trace=False)(x), wanted)
        torch.testing.assert_close(torch.func.vmap(model)(x), wanted)
        swapped = torch.func.functional_call(model, tripled, (x,))
        with torch.autocast("cpu"):
            cast = model(x)
            assert torch.equal(cast, general(model, x))
    with torch.inference_mode():
        assert torch.equal(model(x), wanted)
    assert torch.equal(without(model, x), wanted), "what was swapped for a call is back"
    _in_place(model)
    torch.testing.assert_close(swapped, without(model, x))


NAMES = ("one", "two", "one", "__base__", "two")
OF_FACTORS = (
    "parameters assigned",
    "parameters in place",
    "data exchanged",
    "other rank",
    "scale set",
    "scaling written",
)
OF_MODULES = (
    "hook on a factor",
    "forward of a factor",
    "factor parametrized",
    "scalings exchanged",
    "scaling a tensor",
)


def alone(model: PeftModel, name: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(x)
        model.set_adapter(name)
        return model(x)


def compare_rows(model: PeftModel) -> None:
    x = inputs()[3]
    for _ in range(2):
        with torch.no_grad():
            found = model(x, adapter_names=list(NAMES))
        wanted = torch.stack([alone(model, name, row) for name, row in zip(NAMES, x, strict=True)])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [*OF_FACTORS, *OF_MODULES])
def test_it_is_seen_where_rows_differ(change: str) -> None:
    model = adapted(Sturdy())
    compare_rows(model)
    CHANGES[change][0](model)
    compare_rows(model)


def test_a_scale_that_is_kept_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, stored, 'owner["scaling"][adapter] if scale is None else scale', "0.5")
    model = adapted(Sturdy())
    compare_rows(model)
    layer_of(model).set_scale("one", 3.0)
    with pytest.raises(AssertionError):
        compare_rows(model)


def test_another_dtype_would_be_missed_where_rows_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(model: PeftModel, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(inputs(dtype)[3], adapter_names=list(NAMES))
        return out

    def found() -> Tensor:
        model = adapted(Lifted())
        rows(model, torch.float32)
        rows(model, torch.float32)
        return rows(model.to(torch.bfloat16), torch.bfloat16)

    wanted = found()
    put_defect(monkeypatch, stored, "if A.dtype is not dtype or B.dtype is not dtype:\n", "if False:\n")
    assert not torch.equal(found(), wanted)


class Drawing(Sturdy):
    """Half of the rows of B are dropped in training, by numbers that are drawn."""

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        A, B, scale = super().thin(a)
        return A, B * (torch.rand(B.shape[0], 1) > 0.5) if a.training else B, scale


@pytest.mark.parametrize("rows", [False, True], ids=["one for all", "rows"])
def test_a_method_that_draws_in_training_is_not_asked_once_more(rows: bool) -> None:
    with_tuner(Drawing())
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), narrow(target_modules=["0"]), "one").train()
    names = {"adapter_names": ["one"] * len(inputs()[3])} if rows else {}
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        with torch.no_grad():
            found.append(model(inputs()[3], **names))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("module", "condition", "rows"),
    [
        (bound, "held is None and not part.view.training:", False),
        (stored, "not is_asked and not view.training:", True),
    ],
    ids=["one for all", "rows"],
)
def test_asking_it_once_more_would_be_noticed(
    module: Any, condition: str, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_defect(monkeypatch, module, condition, f"{condition.partition(' and ')[0]}:")
    with pytest.raises(AssertionError):
        test_a_method_that_draws_in_training_is_not_asked_once_more(rows)
