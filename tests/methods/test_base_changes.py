"""Starts that change base weights: in every state, and after every operation, the model computes what its adapters come to, and
the original base is back bit for bit where none acts.

Two adapters with such a start and one without are on the layers. What the model should compute is said by the formula
`W + s (B A - B0 A0)` for those that act, in float64.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc import AdaLoraConfig, LoraConfig, PeftModel

PATHS = ("0", "2")
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def base(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12)).to(dtype)


def options(start: Any = "pissa", **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": list(PATHS), "init_lora_weights": start, "lora_alpha": 6, **more})


def made(dtype: torch.dtype = torch.float32) -> PeftModel:
    """Adapters `p` and `q` with starts that change the base, `n` without; all of them trained a little. `p` is active."""
    model = peftc.get_peft_model(base(dtype), options(), "p")
    model.add_adapter("q", options("olora", r=2))
    model.add_adapter("n", options(True))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def begun(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    held = layer.rebased.held.get(adapter)
    return None if held is None else (held.kept["A"].double(), held.kept["B"].double())


def expected(model: PeftModel, acting: tuple[str, ...], original: nn.Sequential) -> Tensor:
    """The formula, from the tensors of the adapters."""
    y = X.double()
    for index, plain in enumerate(original):
        if isinstance(plain, nn.ReLU):
            y = y.relu()
            continue
        layer, weight = model.get_base_model()[index], plain.weight.detach().double()
        for name in acting:
            A, B = (getattr(layer, slot)[name].weight.detach().double() for slot in ("lora_A", "lora_B"))
            first = begun(layer, name)
            weight = weight + layer.scaling[name] * (B @ A - (first[1] @ first[0] if first else 0))
        y = y @ weight.T + plain.bias.detach().double()
    return y


def same_as(model: PeftModel, acting: tuple[str, ...], original: nn.Sequential, atol: float = 1e-4) -> None:
    dtype = next(original.parameters()).dtype
    with torch.no_grad():
        torch.testing.assert_close(model(X.to(dtype)).double(), expected(model, acting, original), rtol=atol, atol=atol)


@contextmanager
def plain_again(model: PeftModel, original: nn.Sequential) -> Iterator[None]:
    """Within, nothing acts: the base's own weights are in place, bit for bit."""
    with model.disable_adapter():
        for index in map(int, PATHS):
            assert torch.equal(model.get_base_model()[index].get_base_layer().weight, original[index].weight)
        with torch.no_grad():
            x = X.to(next(original.parameters()).dtype)
            assert torch.equal(model(x), original(x))
        yield


# states ---------------------------------------------------------------------------------------------------------------


def only_p(model: PeftModel) -> tuple[str, ...]:
    return ("p",)


def both(model: PeftModel) -> tuple[str, ...]:
    model.base_model.set_adapter(["p", "q"])
    return ("p", "q")


def one_of_each(model: PeftModel) -> tuple[str, ...]:
    model.base_model.set_adapter(["n", "q"])
    return ("n", "q")


def only_n(model: PeftModel) -> tuple[str, ...]:
    model.set_adapter("n")
    return ("n",)


def merged(model: PeftModel) -> tuple[str, ...]:
    model.merge_adapter()
    return ("p",)


def merged_both(model: PeftModel) -> tuple[str, ...]:
    model.base_model.set_adapter(["p", "q"])
    model.merge_adapter()
    return ("p", "q")


def half_merged(model: PeftModel) -> tuple[str, ...]:
    """`p` is merged first, and `q`, with another base weight, afterwards."""
    model.base_model.set_adapter(["p", "q"])
    model.merge_adapter(["p"])
    model.merge_adapter(["q"])
    return ("p", "q")


def merged_beside(model: PeftModel) -> tuple[str, ...]:
    """`n` is merged, `p` acts beside."""
    model.base_model.set_adapter(["p", "n"])
    model.merge_adapter(["n"])
    return ("p", "n")


def merged_not_active(model: PeftModel) -> tuple[str, ...]:
    model.set_adapter("n")
    model.merge_adapter(["n"])
    model.merge_adapter(["q"])
    return ("n", "q")


def merged_while_disabled(model: PeftModel) -> tuple[str, ...]:
    with model.disable_adapter():
        model.merge_adapter(["p"])
    return ("p",)


STATES = (
    only_p, both, one_of_each, only_n, merged, merged_both, half_merged, merged_beside, merged_not_active,
    merged_while_disabled,
)  # fmt: skip

# operations: each returns the model to look at, and what acts in it ---------------------------------------------------

Done = tuple[PeftModel, tuple[str, ...]]


def nothing(model: PeftModel, acting: tuple[str, ...]) -> Done:
    return model, acting


def disabled_and_enabled(model: PeftModel, acting: tuple[str, ...]) -> Done:
    with model.disable_adapter():
        pass
    return model, acting


def disabled_layer_by_layer(model: PeftModel, acting: tuple[str, ...]) -> Done:
    """As other libraries do."""
    layers = [layer for layer in model.modules() if isinstance(layer, peftc.runtime.layer.wrapper.BaseTunerLayer)]
    for enabled in (False, True):
        for layer in layers:
            layer.enable_adapters(enabled)
    return model, acting


def unmerged(model: PeftModel, acting: tuple[str, ...]) -> Done:
    model.unmerge_adapter()
    return model, tuple(model.active_adapters)


def deleted(model: PeftModel, acting: tuple[str, ...]) -> Done:
    """An adapter that is active and not merged, if there is one."""
    found = [name for name in ("p", "q") if name in model.active_adapters and name not in model.session.merged]
    if not found or len(model.active_adapters) == 1:
        return model, acting
    model.delete_adapter(found[0])
    return model, tuple(name for name in acting if name != found[0])


def copied(model: PeftModel, acting: tuple[str, ...]) -> Done:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return twin, acting


def pickled(model: PeftModel, acting: tuple[str, ...]) -> Done:
    return pickle.loads(pickle.dumps(model)), acting


def switched(model: PeftModel, acting: tuple[str, ...]) -> Done:
    model.unmerge_adapter()
    model.set_adapter("q")
    return model, ("q",)


def moved(model: PeftModel, acting: tuple[str, ...]) -> Done:
    return model.to("cpu", torch.float32), acting


def own_state(model: PeftModel, acting: tuple[str, ...]) -> Done:
    """The model's own state dict goes out and in."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    return model, acting


def added(model: PeftModel, acting: tuple[str, ...]) -> Done:
    """A further one decomposes the original weight, whatever is in place."""
    model.add_adapter("r", options())
    kept = begun(model.get_base_model()[0], "r")
    assert kept is not None
    first = begun(model.get_base_model()[0], "p")
    if first is not None:
        torch.testing.assert_close(kept[1] @ kept[0], first[1] @ first[0])
    return model, acting


OPERATIONS = (
    nothing, disabled_and_enabled, disabled_layer_by_layer, unmerged, deleted, copied, pickled, switched, moved, own_state,
    added,
)  # fmt: skip


State = Callable[[PeftModel], tuple[str, ...]]
Operation = Callable[[PeftModel, tuple[str, ...]], Done]
Look = Callable[[PeftModel, tuple[str, ...], nn.Sequential], None]


def holds(model: PeftModel, look: Look, state: State, operation: Operation) -> None:
    """In a state, and after an operation, the model is what `look` wants for the adapters that act, and its base within."""
    original = base()
    acting = state(model)
    look(model, acting, original)
    model, acting = operation(model, acting)
    look(model, acting, original)
    with plain_again(model, original):
        pass
    look(model, acting, original)
    model.unmerge_adapter()
    look(model, tuple(model.active_adapters), original)


def comes_off(model: PeftModel, state: State) -> None:
    """Without the adapters the base is as it was, bit for bit."""
    state(model)
    model.unmerge_adapter()
    for own, before in zip(model.unload().parameters(), base().parameters(), strict=True):
        assert torch.equal(own, before)


def merges(
    model: PeftModel, formula: Callable[[PeftModel, tuple[str, ...], nn.Sequential], Tensor], state: State
) -> None:
    """Merged for good it computes what the formula says."""
    result = formula(model, state(model), base())
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(X).double(), result, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_table(state: State, operation: Operation) -> None:
    holds(made(), same_as, state, operation)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_taken_off_everything_is_as_it_was(state: State) -> None:
    comes_off(made(), state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_merged_for_good(state: State) -> None:
    merges(made(), expected, state)


@pytest.mark.filterwarnings("ignore")
def test_merged_for_good_are_those_that_are_named() -> None:
    model, original = made(), base()
    model.base_model.set_adapter(["p", "n"])
    result = expected(model, ("n",), original)
    with torch.no_grad():
        torch.testing.assert_close(
            model.merge_and_unload(adapter_names=["n"])(X).double(), result, rtol=1e-4, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore")
def test_in_half_precision_the_original_is_back_bit_for_bit() -> None:
    model, original = made(torch.bfloat16), base(torch.bfloat16)
    same_as(model, ("p",), original, atol=0.1)
    with plain_again(model, original):
        pass
    model.merge_adapter()
    with plain_again(model, original):
        pass
    model.delete_adapter("q")
    model.unmerge_adapter()
    same_as(model, ("p",), original, atol=0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.unload().parameters(), original.parameters(), strict=True))


def test_another_method_has_it_too() -> None:
    original = base()
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=list(PATHS), init_lora_weights="pissa")
    model = peftc.get_peft_model(base(), config)
    with torch.no_grad():
        torch.testing.assert_close(model(X), original(X))
    with plain_again(model, original):
        pass
    assert not torch.equal(model.get_base_model()[0].get_base_layer().weight, original[0].weight)


@pytest.mark.filterwarnings("ignore")
def test_of_two_methods_on_a_layer_each_has_its_own() -> None:
    model = peftc.get_peft_model(base(), options(), "p", mixed=True)
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=list(PATHS), init_lora_weights="olora")
    model.add_adapter("a", config)
    original = base()
    for names in (["p"], ["a"], ["p", "a"]):
        model.set_adapter(names)
        with torch.no_grad():
            torch.testing.assert_close(model(X), original(X), rtol=1e-4, atol=1e-4)
        model.base_model.merge_adapter()
        with torch.no_grad():
            torch.testing.assert_close(model(X), original(X), rtol=1e-4, atol=1e-4)
        with plain_again(model, original):
            pass
        model.base_model.unmerge_adapter()
    model.unload()
