"""Calls that meet a state of the model which nothing had paired them with: what is saved, prepared and refused then."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor, nn

from peftc import PeftcError, PeftModel, get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training, rules
from peftc.compiler.passes import modules as compiling
from peftc.functional import set_adapter
from tests.defects import put_defect
from tests.runtime.methods import Net, adapted, mix, narrow, prompted


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# two adapters that train one module whole -------------------------------------------------------------------------------


class Deep(nn.Module):
    """A net in a net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize("act", [PeftModel.set_adapter, lambda m, names: m.base_model.set_adapter(names)])
def test_two_that_train_a_module_whole_do_not_act_together(act: object) -> None:
    model = adapted(narrow(modules_to_save=["head"]), other=narrow(modules_to_save=["head"]), third=narrow())
    names = trained(model)
    with pytest.raises(PeftcError, match="each trains `head` whole") as caught:
        act(model, ["default", "other"])  # type: ignore[operator]
    assert caught.value.diagnostics[0].code == rules.ADAPTERS_CONFLICT.code
    with pytest.raises(PeftcError, match="each trains `head` whole"):
        model.merge_adapter(["default", "other"])
    assert (model.active_adapters, trained(model)) == (["default"], names)
    model.set_adapter(["default", "third"])


def test_two_that_train_parts_of_one_module_whole_do_not_act_together() -> None:
    model = get_peft_model(Deep(), narrow(target_modules=["first"], modules_to_save=["net.head"]))
    model.add_adapter("other", narrow(target_modules=["first"], modules_to_save=["second"]))
    model.set_adapter(["default", "other"])
    outer = get_peft_model(nn.Sequential(Net(), nn.Sequential(nn.Linear(3, 3))), narrow(modules_to_save=["1.0"]))
    outer.add_adapter("other", narrow(modules_to_save=["1"]))
    with pytest.raises(PeftcError, match="cannot act together"):
        outer.set_adapter(["default", "other"])


def test_without_the_check_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, compiling, "yield from _trained_twice(active)", "pass")
    model = adapted(narrow(modules_to_save=["head"]), other=narrow(modules_to_save=["head"]))
    model.set_adapter(["default", "other"])


def test_of_a_model_adapted_in_place_too() -> None:
    model = Net()
    inject_adapter_in_model(narrow(modules_to_save=["head"]), model, "one")
    inject_adapter_in_model(narrow(modules_to_save=["head"]), model, "two")
    with pytest.raises(PeftcError, match="each trains `head` whole"):
        set_adapter(model, ["one", "two"])


# k-bit preparation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: adapted(narrow(bias="all")), prompted], ids=["layers", "prompt"])
def test_preparing_for_kbit_training_leaves_adapters_trainable(make: object) -> None:
    model = make()  # type: ignore[operator]
    names = trained(model)
    assert names != []
    prepare_model_for_kbit_training(model)
    assert trained(model) == names


def test_preparing_a_model_adapted_in_place_does_so_too() -> None:
    model = inject_adapter_in_model(narrow(), Net())
    names = trained(model)
    model.head.weight.requires_grad_(True)
    prepare_model_for_kbit_training(model)
    assert trained(model) == names


# embeddings of any model ------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A model of nobody's, that tells its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.net = Net()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.net(self.embed_tokens(ids))
        return out

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def test_embeddings_of_any_model_that_tells_them_are_saved(tmp_path: Path) -> None:
    model = get_peft_model(Words(), narrow(target_modules=["first"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.embed_tokens.weight" in keys(tmp_path)


# what is weighed --------------------------------------------------------------------------------------------------------


def test_the_refusal_to_weigh_names_what_is_in_the_way() -> None:
    parts = mix(narrow(modules_to_save=["head"]), narrow(bias="all"))
    with pytest.raises(PeftcError) as caught:
        get_peft_model(Net(), parts)
    told = str(caught.value)
    assert "it trains `head` whole" in told and "without `modules_to_save`" in told
    assert "of the base" in told


# names ------------------------------------------------------------------------------------------------------------------


def test_modules_and_parameters_are_told_apart() -> None:
    level = adapted().base_model
    assert (level.targeted_module_names, level.targeted_parameter_names) == (["first", "second"], [])
