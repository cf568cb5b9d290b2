"""Base weights that are not where their layer is, and weights that a layer computes: operations by places.

Each operation does what it does on the same model with plain weights, or is refused by name, with nothing changed.
`test_offloaded` has the first of these places for every method.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from peftc import PeftcError, PeftModel, convert_adapter, get_peft_model, rules
from peftc.host import offload
from peftc.runtime.applying import snapshot
from peftc.runtime.bases import places
from peftc.runtime.session import together
from peftc.testing.models import seeded
from tests.defects import put_defect
from tests.runtime.methods import LANGUAGE_MODEL, narrow

CPU = torch.device("cpu")
IDS = LANGUAGE_MODEL.arguments()["input_ids"]


class Same(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor


def in_memory(base: Any, folder: Path) -> Any:
    return cpu_offload(base, CPU)


def on_disk(base: Any, folder: Path) -> Any:
    return disk_offload(base, folder / "weights", CPU)


def in_both(base: Any, folder: Path) -> Any:
    tops = [name for name, module in base.named_modules() if name.count(".") == 2 and list(module.parameters())]
    rest = [name for name, _ in base.named_parameters() if not name.startswith(tuple(f"{top}." for top in tops))]
    where = {name: ("disk", "cpu")[i % 2] for i, name in enumerate(tops)} | dict.fromkeys(rest, "cpu")
    assert set(where.values()) == {"cpu", "disk"}
    return dispatch_model(base, where, offload_dir=str(folder / "weights"))


def by_device_map(base: Any, folder: Path) -> Any:
    base.save_pretrained(folder / "base")
    inside = [name for name, _ in base.model.named_children() if name != "layers"]
    where: dict[str, Any] = dict.fromkeys([f"model.{name}" for name in inside] + ["lm_head", "model.layers.0"], "cpu")
    where["model.layers.1"] = "disk"
    return type(base).from_pretrained(folder / "base", device_map=where, offload_folder=folder / "off").eval()


def normed(base: Any, folder: Path) -> Any:
    """Weights that layers compute of a length and a direction."""
    for module in [module for module in base.model.modules() if isinstance(module, nn.Linear)]:
        parametrizations.weight_norm(module)
    return base


def parametrised(base: Any, folder: Path) -> Any:
    for module in [module for module in base.modules() if isinstance(module, nn.Linear)]:
        parametrize.register_parametrization(module, "weight", Same())
    return base


OFFLOADED = (in_memory, on_disk, in_both, by_device_map)
COMPUTED = (normed, parametrised)


class Case:
    """A model with a trained adapter in a place, and the same with plain weights."""

    def __init__(self, way: Callable[[Any, Path], Any], folder: Path) -> None:
        self.folder = folder
        self.plain, self.model = self.adapted(self.base()), self.adapted(way(self.base(), folder))
        assert way in COMPUTED or any(p.is_meta for p in self.model.parameters())

    @staticmethod
    def base() -> Any:
        with seeded(1):
            return LANGUAGE_MODEL.build().eval()

    @staticmethod
    def adapted(base: Any) -> PeftModel:
        model = get_peft_model(base, narrow(target_modules="all-linear"))
        with torch.no_grad():
            for number, (_, p) in enumerate(sorted(model.session.tensors("default").items())):
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        return model.eval()

    def both(self, act: Callable[[Any], Any]) -> list[Any]:
        return [act(self.model), act(self.plain)]

    def near(self, one: Any = None, other: Any = None) -> None:
        with torch.no_grad():
            found, wanted = ((one or self.model)(input_ids=IDS).logits, (other or self.plain)(input_ids=IDS).logits)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def call(case: Case) -> None:
    case.near()


def train(case: Case) -> None:
    for model in (case.model, case.plain):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    case.near()


def generate(case: Case) -> None:
    one, other = case.both(lambda model: model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False))
    assert torch.equal(one, other)


def merge(case: Case) -> None:
    case.model.merge_adapter()
    case.near()


def unmerge(case: Case) -> None:
    with torch.no_grad():
        y = case.model(input_ids=IDS).logits
        case.model.merge_adapter()
        case.model.unmerge_adapter()
        assert torch.equal(case.model(input_ids=IDS).logits, y)


def merge_and_unload(case: Case) -> None:
    case.near(case.model.merge_and_unload())


def unload(case: Case) -> None:
    case.near(case.model.unload(), case.base())


def save(case: Case) -> None:
    case.model.save_pretrained(case.folder / "saved")
    case.near(PeftModel.from_pretrained(case.base(), case.folder / "saved").eval())


def load_adapter(case: Case) -> None:
    case.plain.save_pretrained(case.folder / "saved")
    case.model.load_adapter(case.folder / "saved", "other")
    case.model.set_adapter("other")
    case.near()


def convert(case: Case) -> None:
    one, other = case.both(lambda model: convert_adapter(model, "NARROW", 1))
    assert one.ranks == other.ranks and one.error == pytest.approx(other.error, rel=1e-4)
    for key, tensor in other.tensors.items():
        torch.testing.assert_close(one.tensors[key].abs(), tensor.abs(), rtol=1e-3, atol=1e-3)


def delete(case: Case) -> None:
    for model in (case.model, case.plain):
        model.add_adapter("other", narrow(target_modules="all-linear"))
        model.delete_adapter("other")
    case.near()


def disable(case: Case) -> None:
    with case.model.disable_adapter():
        case.near(case.model, case.base())
    case.near()


def train_whole(case: Case) -> None:
    """Copies of modules that are trained whole stay with the model."""
    for model in (case.model, case.plain):
        model.add_adapter("other", narrow(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model.set_adapter("other")
    states = [model.session.tensors("other") for model in (case.model, case.plain)]
    with torch.no_grad():
        for key in states[1]:
            if "lm_head" not in key:
                states[1][key].copy_(states[0][key])
    train(case)


OPERATIONS = [
    call, train, generate, merge, unmerge, merge_and_unload, unload, save, load_adapter, convert, delete, disable,
    train_whole,
]  # fmt: skip
#: what cannot be done, with the rule that says so
REFUSED = {
    (operation, way): rules.WEIGHT_ELSEWHERE for operation in (merge, unmerge, merge_and_unload) for way in COMPUTED
}


#: `test_offloaded` has the others of those places
NOT_THERE = (generate, unload, convert, train_whole)
CASES = [
    pytest.param(way, operation, id=f"{way.__name__}-{operation.__name__}")
    for way in (*OFFLOADED, *COMPUTED)
    for operation in (NOT_THERE if way in (in_memory, on_disk, in_both) else OPERATIONS)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "operation"), CASES)
def test_it_is_done_as_on_plain_weights_or_refused_by_name(
    way: Callable[[Any, Path], Any], operation: Callable[[Case], None], tmp_path: Path
) -> None:
    case = Case(way, tmp_path)
    rule = REFUSED.get((operation, way))
    if rule is None:
        operation(case)
        return
    with pytest.raises(PeftcError) as caught:
        operation(case)
    assert [problem.code for problem in caught.value.diagnostics] == [rule.code]
    assert any(path in str(caught.value) for path in case.model.session.layers)
    case.near()


# ties -----------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def merged(first: bool) -> Any:
    """A model of tied weights in main memory, offloaded before it is adapted or after, with equal updates merged."""
    base = Tied()
    if first:
        cpu_offload(base, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, narrow(target_modules=["first", "second"]))
    tensors = model.session.tensors("default")
    with torch.no_grad():
        for key in tensors:
            if ".second." in key:
                tensors[key].copy_(tensors[key.replace(".second.", ".first.")])
    if not first:
        cpu_offload(model, CPU)
    model.merge_adapter()
    return model.get_base_model()


def shared(base: Any) -> bool:
    one, other = (offload.held(layer.get_base_layer(), "weight") for layer in (base.first, base.second))
    assert one is not None and other is not None
    return one.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_tied_weights_in_main_memory_stay_one_tensor(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared(merged(first))
    put_defect(monkeypatch, together, "        share_brought(owners, tail)\n", "")
    assert not shared(merged(first))


def test_the_graph_knows_ties_of_tensors_that_are_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    base = cpu_offload(Tied(), CPU)
    assert snapshot.snapshot(base).ties == (("first.weight", "second.weight"),)
    put_defect(monkeypatch, snapshot, "if tensor.is_meta else None", "if False else None")
    assert snapshot.snapshot(base).ties == ()


def test_weights_that_came_out_different_stay_apart() -> None:
    base = merged(True)
    layers = [layer.get_base_layer() for layer in (base.first, base.second)]
    places.change(layers[1], {"weight": nn.Parameter(torch.zeros(8, 8), requires_grad=False)})
    places.share_brought(layers, "weight")
    assert not shared(base)
