"""Copies of modules that are trained whole, beside a base in half precision: kinds of modules by operations.

They train in float32, as slots do; what they take and give, and what is merged and saved of them, is in the base's format.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peftc.checkpoint.names import WEIGHTS_NAME
from peftc.compiler.plan.cost import cost_of
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.render import render_plan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.model.functions.precision import cast_adapter_dtype
from peftc.runtime.applying.planning import plan_for
from peftc.runtime.around import lifted, saved_modules
from peftc.runtime.session import stored
from tests.defects import put_defect
from tests.runtime.methods import narrow

IDS = torch.tensor([[1, 4, 2], [7, 0, 9], [3, 3, 5]])


class Pair(NamedTuple):
    states: Tensor
    rest: list[Tensor]


class Block(nn.Module):
    """Takes tensors in a mapping by keyword and gives them in tuples, lists and mappings, indices among them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, states: Tensor, *, beside: Mapping[str, Any]) -> tuple[Pair, dict[str, Any]]:
        found = self.inner(states) + beside["also"] + self.shift
        return Pair(found, [found * 2]), {"indices": beside["indices"], "nothing": None}


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.block = Block()
        self.spread = nn.BatchNorm1d(3)
        self.conv = nn.Conv1d(3, 3, 1)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        states = self.norm(self.first(self.embed(ids)))
        pair, beside = self.block(states, beside={"also": states, "indices": ids})
        assert isinstance(pair, Pair) and beside["indices"] is ids
        found: Tensor = self.head(self.conv(self.spread(pair.states + pair.rest[0])))
        return found


class Kind(NamedTuple):
    names: list[str]
    tied: bool = False


KINDS = {
    "linear": Kind(["head"]),
    "embedding": Kind(["embed"]),
    "norm": Kind(["norm"]),
    "block": Kind(["block"]),
    "buffers": Kind(["spread"]),
    "convolution": Kind(["conv"]),
    "tied head": Kind(["head"], tied=True),
    "tied both": Kind(["embed", "head"], tied=True),
}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


class Case:
    """A base in half precision with trained adapters, and the same in float32 to compare with."""

    def __init__(self, kind: Kind, half: torch.dtype, folder: Path) -> None:
        self.kind, self.half, self.folder = kind, half, folder
        self.model, self.wide = self.adapted(half), self.adapted(half).float()
        self.move("default")

    def base(self, half: torch.dtype) -> Model:
        torch.manual_seed(0)
        return Model(self.kind.tied).to(half).eval()

    def config(self) -> Any:
        return narrow(target_modules=["first"], modules_to_save=self.kind.names)

    def adapted(self, half: torch.dtype) -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(self.base(half), self.config()).eval()

    def move(self, name: str) -> None:
        """Train both: to values that half precision cannot hold."""
        wide = self.own(self.wide, name)
        with torch.no_grad():
            for own, tensor in self.own(self.model, name).items():
                g = torch.Generator().manual_seed(len(own) + len(name))
                tensor.add_(torch.randn(tensor.shape, generator=g) * 0.3)
                wide[own].copy_(tensor)

    @staticmethod
    def own(model: nn.Module, name: str) -> dict[str, Tensor]:
        return {own: p for own, p in model.named_parameters() if f".{name}." in own and p.is_floating_point()}

    def copies(self, name: str = "default") -> dict[str, Tensor]:
        return {own: p for own, p in self.own(self.model, name).items() if "modules_to_save" in own}

    def near(self, model: Any = None, wide: Any = None) -> None:
        """The output is that of the model in float32, but for rounding, and in the base's format."""
        y = (self.model if model is None else model)(IDS)
        assert y.dtype is self.half
        assert apart(y, (wide or self.wide)(IDS)) < (0.02 if self.half is torch.bfloat16 else 0.002)


def train(case: Case) -> None:
    before = {name: p.detach().clone() for name, p in case.copies().items()}
    assert before and {p.dtype for p in case.copies().values()} == {torch.float32}
    for model in (case.model, case.wide):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        model(IDS).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
        optimizer.step()
    for name, parameter in case.copies().items():
        assert not torch.equal(before[name], parameter), "a step that half precision would round away"
    case.near()


def train_under_autocast(case: Case) -> None:
    with torch.autocast("cpu", dtype=case.half):
        y = case.model(IDS)
        y.float().square().mean().backward()
    assert all(p.grad is not None for p in case.copies().values())
    assert y.dtype is case.half


def merge(case: Case) -> None:
    for model in (case.model, case.wide):
        model.merge_adapter()
    case.near()


def unmerge(case: Case) -> None:
    y = case.model(IDS)
    case.model.merge_adapter()
    case.model.unmerge_adapter()
    assert torch.equal(case.model(IDS), y)
    case.near()


def merge_and_unload(case: Case) -> None:
    merged: Any = case.model.merge_and_unload()
    case.near(merged)
    assert {t.dtype for t in merged.state_dict().values() if t.is_floating_point()} == {case.half}


def fail_to_merge(case: Case) -> None:
    bits = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(case.model.session), "unload", _fail)
        with pytest.raises(MemoryError):
            case.model.merge_and_unload()
    after = case.model.state_dict()
    assert all(after[name].dtype is bit.dtype and torch.equal(after[name], bit) for name, bit in bits.items())


def _fail(*args: object) -> None:
    raise MemoryError


def unload(case: Case) -> None:
    assert torch.equal(case.model.unload()(IDS), case.base(case.half)(IDS))


def disable(case: Case) -> None:
    with case.model.disable_adapter():
        assert torch.equal(case.model(IDS), case.base(case.half)(IDS))
    case.near()


def add_second(case: Case) -> None:
    for model in (case.model, case.wide):
        model.add_adapter("other", case.config())
    case.move("other")
    case.near()
    for model in (case.model, case.wide):
        model.set_adapter("other")
    assert {p.dtype for p in case.copies("other").values()} == {torch.float32}
    case.near()
    if not {"norm", "block", "spread", "conv"} & set(case.kind.names):  # what comes of rows by themselves
        rows = case.model(IDS, adapter_names=["default", "__base__", "other"])
        assert rows.dtype is case.half
        assert apart(rows[2], case.wide(IDS)[2]) < 0.02


def delete(case: Case) -> None:
    add_second(case)
    for model in (case.model, case.wide):
        model.set_adapter("default")
        model.delete_adapter("other")
    assert not case.copies("other")
    case.near()


def save_and_load(case: Case) -> None:
    case.model.save_pretrained(case.folder)
    for key, tensor in load_file(case.folder / WEIGHTS_NAME).items():
        wanted = torch.float32 if "narrow" in key else case.half
        assert not tensor.is_floating_point() or tensor.dtype is wanted, key
    loaded = PeftModel.from_pretrained(case.base(case.half), case.folder, is_trainable=True).eval()
    case.near(loaded)
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}
    thin = PeftModel.from_pretrained(case.base(case.half), case.folder, autocast_adapter_dtype=False).eval()
    case.near(thin)
    assert case.half in {p.dtype for name, p in thin.named_parameters() if "modules_to_save" in name}
    PeftModel.from_pretrained(case.base(torch.float32).float(), case.folder)
    case.model.load_adapter(case.folder, "default")
    case.near()


def keep_state(case: Case) -> None:
    """In memory nothing is rounded."""
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(case.model).items()}
    for tensor in case.own(case.model, "default").values():
        tensor.data.zero_()
    set_peft_model_state_dict(case.model, state)
    again = get_peft_model_state_dict(case.model)
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def cast(case: Case) -> None:
    """Whoever casts the whole model casts what is trained with it; then nothing is lifted any more."""
    case.model.to(case.half)
    assert {p.dtype for p in case.copies().values()} == {case.half}
    case.near()
    case.model.float()
    assert apart(case.model(IDS), case.wide(IDS)) < 0.02
    case.model.save_pretrained(case.folder)
    assert case.half not in {tensor.dtype for tensor in load_file(case.folder / WEIGHTS_NAME).values()}


def cast_later(case: Case) -> None:
    """What was added as it is can be lifted afterwards."""
    model = PeftModel(case.base(case.half), case.config(), autocast_adapter_dtype=False).eval()
    assert case.half in {p.dtype for p in Case.own(model, "default").values()}
    cast_adapter_dtype(model, "default")
    assert {p.dtype for p in Case.own(model, "default").values()} == {torch.float32}
    assert model(IDS).dtype is case.half


def copy_whole(case: Case) -> None:
    case.near(copy.deepcopy(case.model))


def read_weights(case: Case) -> None:
    """Who reads a weight off a wrapper computes with it, beside others in the base's format."""
    head = case.model.get_base_model().head
    read = head.weight
    assert read.dtype is case.half
    if "head" in case.kind.names:
        nn.functional.linear(torch.ones(2, 8, dtype=case.half), read).sum().backward()
        assert next(p for name, p in case.copies().items() if ".head." in name).grad is not None


def plan(case: Case) -> None:
    made = plan_for(case.base(case.half), {"default": case.config()})
    planned = {p.name: p.dtype for p in made.adapters[0].parameters()}
    live = dict(case.model.named_parameters(remove_duplicate=False))
    assert planned.items() <= {name: str(p.dtype).removeprefix("torch.") for name, p in live.items()}.items()
    added = sum(p.numel() * p.element_size() for name, p in live.items() if name in planned)
    assert cost_of(made).gradients == added
    assert "a float32 copy" in "".join(render_plan(made))
    assert plan_from_json(plan_to_json(made)).adapters == made.adapters
    assert isinstance(made, InjectionPlan)


OPERATIONS: list[Callable[[Case], None]] = [
    train, train_under_autocast, merge, unmerge, merge_and_unload, fail_to_merge, unload, disable, add_second, delete,
    save_and_load, keep_state, cast, cast_later, copy_whole, read_weights, plan,
]  # fmt: skip


#: every kind in one format, and what has most of them in the other
FORMATS = [
    pytest.param(kind, half, id=f"{name}-{half}".replace("torch.", ""))
    for name, kind in KINDS.items()
    for half in (torch.bfloat16, *([torch.float16] if name == "block" else []))
]


@pytest.mark.filterwarnings("ignore::peftc.PeftcWarning")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize(("kind", "half"), FORMATS)
def test_a_copy_trains_in_float32_beside_a_base_in_half_precision(
    kind: Kind, half: torch.dtype, operation: Callable[[Case], None], tmp_path: Path
) -> None:
    operation(Case(kind, half, tmp_path))


#: what is left out, and the operation that shows it, on a kind
DEFECTS: list[tuple[Any, str, str, str, Callable[[Case], None]]] = [
    (saved_modules, "            lift(tensor)\n", "            pass\n", "linear", train),
    (saved_modules, "if half is None else called(", "if True else called(", "linear", disable),
    (lifted, "given = own or half", "given = own or torch.float32", "embedding", disable),
    (lifted, "            keep_memory(tensor)\n", "", "linear", fail_to_merge),
    (saved_modules, "else narrow(found, self.original_module)", "else found", "norm", merge_and_unload),
    (stored, "result[key] = narrowed(", "_ = narrowed(", "block", save_and_load),
]


@pytest.mark.filterwarnings("ignore::peftc.PeftcWarning")
@pytest.mark.parametrize(("module", "text", "other", "kind", "operation"), DEFECTS)
def test_a_row_fails_under_a_defect(
    module: Any, text: str, other: str, kind: str, operation: Callable[[Case], None], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        put_defect(patch, module, text, other)
        with pytest.raises((AssertionError, RuntimeError)):
            operation(Case(KINDS[kind], torch.bfloat16, tmp_path))
