"""What a model keeps aside goes along with it: weights that were merged into, biases as they were, tensors that do not act."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc import PeftModel, get_peft_model
from peftc.testing.subjects import Subject
from tests.runtime.examples import examples
from tests.runtime.methods import Net, adapted, narrow, x

#: one of each method that can be merged, on a small model
MERGING = examples(lambda s: s.foremost and s.merges)
#: one of each method around modules
AROUND = examples(lambda s: s.foremost and s.method.module_tuner is not None)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def of_base(model: PeftModel) -> dict[str, Tensor]:
    """All tensors by name, without what wrappers put into it."""
    return {name.replace("base_layer.", ""): tensor for name, tensor in state(model.get_base_model()).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == tensor.dtype and torch.equal(one[name], tensor) for name, tensor in other.items()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", MERGING, ids=lambda s: s.method.peft_type)
def test_a_model_that_was_cast_while_merged_unmerges_to_the_cast_base(s: Subject, dtype: torch.dtype) -> None:
    model = s.trained()
    twin = copy.deepcopy(model)
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    assert same(state(model), state(twin.to(dtype)))
    s.output(model, dtype)


@pytest.mark.parametrize("s", AROUND, ids=lambda s: s.method.peft_type)
def test_an_adapter_aside_is_cast_with_the_model(s: Subject) -> None:
    model = s.trained("first")
    s.join(model, "second")
    model.to(torch.float64)
    own = {p.dtype for p in model.parameters()}
    assert own == {torch.float64}
    model.set_adapter("second")
    assert {p.dtype for p in model.parameters()} == own


@pytest.mark.parametrize("end", ["delete", "unload"])
def test_biases_go_back_in_the_dtype_of_the_model(end: str) -> None:
    model = get_peft_model(Net(), narrow(bias="all"), "one")
    before = {name: tensor for name, tensor in of_base(model).items() if name.endswith("bias")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1.0)
    base = model.get_base_model()
    model.to(torch.float64)
    model.unload() if end == "unload" else model.delete_adapter("one")
    after = {name.replace("base_layer.", ""): tensor for name, tensor in state(base).items()}
    assert all(torch.equal(after[name], tensor.double()) for name, tensor in before.items())


def with_bias() -> list[Subject]:
    return [s for s in MERGING if "bias" in s.method.config.model_fields]


@pytest.mark.parametrize("s", with_bias(), ids=lambda s: s.method.peft_type)
def test_trained_biases_are_saved_as_they_are_not_as_they_were_merged(s: Subject, tmp_path: Path) -> None:
    model = s.trained(bias="all")
    model.save_pretrained(tmp_path / "apart")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(".bias"):
                parameter.add_(1.0)
    wanted = {key: tensor.clone() for key, tensor in model.adapter_tensors("default").items()}
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert same(load_file(tmp_path / "merged" / "adapter_model.safetensors"), wanted)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    s.grown(model)
    model.unmerge_adapter()
    assert same(dict(model.adapter_tensors("default")), wanted)
    assert trainable <= {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("names", [None, ["default"]], ids=["active", "named"])
@pytest.mark.parametrize("disabled", [True, False], ids=["disabled", "enabled"])
def test_what_is_trained_whole_is_merged_for_good_with_its_adapter(names: list[str] | None, disabled: bool) -> None:
    model = adapted(narrow(target_modules=["first"], modules_to_save=["head"]), other=narrow(target_modules=["first"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    y = model(x())
    if names is not None:
        model.set_adapter("other")
    if disabled:
        model.base_model.disable_adapter_layers()
    torch.testing.assert_close(model.merge_and_unload(adapter_names=names)(x()), y)


@pytest.mark.parametrize("r", [2, 3], ids=["in place", "replaced"])
@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
def test_loading_over_an_adapter_leaves_the_others_as_trainable_as_they_were(
    tmp_path: Path, r: int, active: bool, trains: bool
) -> None:
    adapted(narrow(r=r)).save_pretrained(tmp_path)
    model = adapted(other=narrow())
    model.set_adapter(["default", "other"] if active else "other")
    model.set_requires_grad("default", False)
    model.load_adapter(tmp_path, "default", is_trainable=trains)
    wanted = {"other", "default"} if trains and active else {"other"}
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == wanted
    model.set_requires_grad("other", False)
    model.load_adapter(tmp_path, "default", is_trainable=trains)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == wanted - {"other"}


@pytest.mark.parametrize("whole", [True, False], ids=["trained whole before", "adapted before"])
def test_a_module_that_a_deleted_adapter_had_is_free_for_another(whole: bool) -> None:
    adapts = narrow(target_modules=["first", "head"])
    trains = narrow(target_modules=["first"], modules_to_save=["head"])
    before, after = (trains, adapts) if whole else (adapts, trains)
    model = get_peft_model(Net(), before.model_copy(), "one")
    model.delete_adapter("one")
    model.add_adapter("one", after.model_copy())
    fresh = get_peft_model(Net(), after.model_copy(), "one")
    assert model.adapter_tensors("one").keys() == fresh.adapter_tensors("one").keys()
    assert list(dict(model.named_parameters())) == list(dict(fresh.named_parameters()))
    model.set_adapter("one")
    y = model(x())
    torch.testing.assert_close(model.merge_and_unload()(x()), y)
