"""A method that is registered in a process, and not installed: at once one like all others, replaced by the next, gone after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import peftc
from peftc import PeftcError, PeftModel, PeftType, get_peft_config, get_peft_model, rules
from peftc.plugin import TunerMethod, method, register_plugin, unregister_plugin
from peftc.registry.manager import default_registry
from peftc.testing.kit import chosen
from tests.defects import put_defect
from tests.runtime.methods import METHODS, NarrowConfig, NarrowTuner, Net, x
from tests.unit import fakes

Patch = pytest.MonkeyPatch
RECORD = next(record for record in METHODS if record.peft_type == "NARROW")
OPTIONS = {"peft_type": "NARROW", "target_modules": ["first"]}


@pytest.fixture
def registered() -> Iterator[TunerMethod]:
    yield register_plugin(RECORD)
    default_registry().forget("NARROW")


def test_it_is_one_like_all_others_at_once(registered: TunerMethod) -> None:
    assert registered is RECORD
    assert "NARROW" in list(PeftType) and peftc.NarrowConfig is NarrowConfig
    model = get_peft_model(Net(), get_peft_config(OPTIONS))
    assert type(model.base_model).__name__ == "NarrowModel"
    assert isinstance(model.base_model.model.first, peftc.NarrowLayer)


def test_a_module_is_taken_by_its_hook() -> None:
    module = SimpleNamespace(peftc_tuner=fakes.plugin(RECORD).peftc_tuner, __name__="narrow")  # type: ignore[attr-defined]
    assert register_plugin(module) is RECORD
    unregister_plugin(RECORD)
    assert "NARROW" not in default_registry().names


def test_what_a_cell_has_made_is_taken_as_it_is() -> None:
    peftc_tuner = method(NarrowConfig, NarrowTuner(), prefix="narrow_", layer_names=("narrow_A", "narrow_B"))
    assert register_plugin(peftc_tuner) is peftc_tuner()
    assert peftc.NarrowConfig is NarrowConfig
    unregister_plugin("NARROW")


def test_unregistering_undoes_it(registered: TunerMethod) -> None:
    unregister_plugin("NARROW")
    assert "NARROW" not in list(PeftType)
    with pytest.raises(PeftcError) as caught:
        get_peft_config(OPTIONS)
    assert caught.value.diagnostics[0].code == rules.UNKNOWN_TYPE.code
    with pytest.raises(AttributeError):
        _ = peftc.NarrowConfig
    with pytest.raises(PeftcError, match="PC201"):
        unregister_plugin("NARROW")


def test_the_next_replaces_it_with_all_that_goes_by_its_name(registered: TunerMethod) -> None:
    before = (peftc.NarrowConfig, peftc.NarrowLayer, peftc.NarrowModel)

    class NarrowConfig(before[0]):  # type: ignore[misc,valid-type]  # as a cell that is run again makes another
        """The same again."""

    register_plugin(replace(RECORD, config=NarrowConfig, layer_names=("narrow_A",)))
    assert peftc.NarrowConfig is NarrowConfig
    assert peftc.NarrowLayer is not before[1] and peftc.NarrowLayer.adapter_layer_names == ("narrow_A",)
    model = get_peft_model(Net(), get_peft_config(OPTIONS))
    assert isinstance(model.base_model.model.first, peftc.NarrowLayer) and isinstance(
        model.base_model, peftc.NarrowModel
    )
    assert not isinstance(model.base_model.model.first, before[1])


def test_it_is_saved_and_loaded(registered: TunerMethod, tmp_path: object) -> None:
    torch.manual_seed(0)
    base = Net()
    model = get_peft_model(base, get_peft_config(OPTIONS)).eval()
    y = model(x())
    model.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(model.unload(), str(tmp_path)).eval()(x()), y)


def test_an_installed_type_is_neither_replaced_nor_taken_out() -> None:
    installed = default_registry().claims[0].peft_type
    other = type(
        "OtherConfig", (NarrowConfig,), {"__annotations__": {"peft_type": PeftType}, "peft_type": PeftType(installed)}
    )
    for act in (
        lambda: register_plugin(replace(RECORD, peft_type=installed, config=other)),
        lambda: unregister_plugin(default_registry().get(installed)),
    ):
        with pytest.raises(PeftcError) as caught:
            act()
        (problem,) = caught.value.diagnostics
        assert problem.code == rules.PLUGIN_CONFLICT.code and "PEFTC_BLOCK" in problem.fix
    assert installed in default_registry().names


def test_a_record_that_breaks_the_contract_is_refused() -> None:
    with pytest.raises(PeftcError, match="needs a `prefix`"):
        register_plugin(replace(RECORD, prefix=""))
    with pytest.raises(PeftcError, match="no function is marked"):
        register_plugin(fakes)  # type: ignore[arg-type]


def test_the_kit_says_that_another_process_cannot_plan_it(registered: TunerMethod, monkeypatch: Patch) -> None:
    case = chosen("NARROW", ["plan_equals_model"])[0]
    with pytest.raises(PeftcError, match="known to this process alone") as caught:
        case.run()
    assert "peftc plugins check FILE" in caught.value.diagnostics[0].fix


def test_the_tests_of_replacing_can_fail(registered: TunerMethod, monkeypatch: Patch) -> None:
    put_defect(monkeypatch, peftc, "if registry.claims_for(method.peft_type):", "if True:")
    with pytest.raises(AssertionError):
        test_the_next_replaces_it_with_all_that_goes_by_its_name(registered)
    vars(peftc).pop("NarrowConfig", None)
