"""Outputs with a constant: scale and shift (SSF) as a stranger's plugin, merged into weight and bias; and what no weight can do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc import PeftcError, PeftcWarning, PeftModel, get_peft_model, rules
from peftc import plugin as api
from peftc.registry.manager import default_registry
from peftc.runtime.layer.affine import Form, form_of
from peftc.runtime.session import session
from peftc.testing import examine
from peftc.testing.subjects import randomise
from tests.defects import put_defect
from tests.runtime.methods import narrow, stretch
from tests.unit.fakes import plugin


class ShiftConfig(api.TargetsMixin, api.ExpertsMixin, api.PeftConfig):
    """Options of scale and shift."""

    peft_type: api.PeftType | None = api.PeftType("SHIFT")


class ShiftTuner(api.MapTuner[ShiftConfig]):
    """`y = a * (W x + b) + c` (Lian et al., arXiv:2210.08823)."""

    supports = api.LINEAR_KINDS | api.CONV_KINDS

    def slots(self, c: ShiftConfig, layer: api.LayerFacts) -> Iterable[api.Slot]:
        yield api.parameter_slot("shift_scale", (layer.out_features,))
        yield api.parameter_slot("shift_by", (layer.out_features,))

    def init(self, c: ShiftConfig, layer: api.LayerFacts, slots: Mapping[str, Tensor], init: api.SlotInit) -> None:
        init.ones(slots["shift_scale"])
        init.zeros(slots["shift_by"])

    def output(self, a: api.View, y: Tensor) -> Tensor:
        return y * a.shift_scale + a.shift_by


class Everywhere(ShiftTuner):
    """The same where there is no bias that could take the constant."""

    supports = api.LINEAR_KINDS | api.CONV_KINDS | api.EXPERT_KINDS | {api.Kind.EMBEDDING}


class Spares(ShiftTuner):
    spares_bias = True


class Bends(ShiftTuner):
    def output(self, a: api.View, y: Tensor) -> Tensor:
        return y * a.shift_scale + (y * a.shift_by).tanh()


def record(tuner: api.MapTuner[Any], examples: tuple[Mapping[str, Any], ...] = ({},)) -> api.TunerMethod:
    return api.TunerMethod(
        "SHIFT", ShiftConfig, tuner, prefix="shift_", layer_names=("shift_scale", "shift_by"), examples=examples
    )


@pytest.fixture
def using() -> Iterator[Any]:
    registry = default_registry()
    yield lambda tuner: registry.register(plugin(record(tuner)), "shift")
    registry.forget("SHIFT")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(7, 6)
        self.with_bias = nn.Linear(6, 6)
        self.without = nn.Linear(6, 6, bias=False)
        self.conv = nn.Conv1d(6, 6, 2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.without(self.with_bias(self.emb(ids)).relu())
        out: Tensor = self.conv(h.transpose(1, 2))
        return out


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LAYERS = ["with_bias", "without", "conv"]


def shifted(*targets: str, adapter: str = "default") -> PeftModel:
    model = get_peft_model(Net().double(), ShiftConfig(target_modules=list(targets or LAYERS)), adapter).eval()
    randomise(model, adapter)
    return model


def merged_quietly(model: PeftModel, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftcWarning)
        model.merge_adapter(**options)


def test_it_passes_the_conformance_kit(using: Any) -> None:
    using(ShiftTuner())
    only = [
        "merged_equals_unmerged",
        "unmerging_restores",
        "lowerings_agree",
        "several_active_merge_alike",
        "rows_are_as_alone",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftcWarning)
        report = examine("SHIFT", *only)
    assert report.findings == ()


@pytest.mark.parametrize("target", LAYERS)
def test_the_constant_goes_into_the_bias_and_comes_out_again(target: str, using: Any) -> None:
    using(ShiftTuner())
    model = shifted(target)
    y, base = model(IDS), model.get_base_model().get_submodule(target).base_layer
    objects, state = dict(base._parameters), {name: p.clone() for name, p in base.named_parameters()}
    merged_quietly(model, safe_merge=True)
    torch.testing.assert_close(model(IDS), y)
    assert base.bias is not None
    assert not torch.equal(base.bias, torch.zeros_like(base.bias))
    moved = copy.deepcopy(model).float()
    assert moved.get_base_model().get_submodule(target).base_layer.bias.dtype is torch.float32
    model.unmerge_adapter()
    assert all(base._parameters[name] is own for name, own in objects.items())
    assert all(torch.equal(p, state[name]) for name, p in base.named_parameters())
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=0)


def test_a_bias_that_was_not_there_is_told(using: Any) -> None:
    using(ShiftTuner())
    with pytest.warns(PeftcWarning, match=rf"{rules.BIAS_GAINED.code}.*`without`, `conv`"):
        merged = shifted().merge_and_unload()
    assert merged.without.bias is not None
    assert "without.bias" in merged.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftcWarning)
        shifted("with_bias").merge_adapter()


def test_the_telling_can_fail(using: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    using(ShiftTuner())
    put_defect(monkeypatch, session, "warn(gained(self.layers))", "pass")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftcWarning)
        shifted("without").merge_adapter()


def test_several_act_in_their_order_merged_or_not(using: Any) -> None:
    using(ShiftTuner())
    model = shifted()
    model.add_adapter("other", ShiftConfig(target_modules=LAYERS))
    randomise(model, "other")
    model.base_model.set_adapter(["default", "other"])
    y = model(IDS)
    merged_quietly(model)
    torch.testing.assert_close(model(IDS), y)
    model.unmerge_adapter()
    merged_quietly(model, adapter_names=["default"])
    torch.testing.assert_close(model(IDS), y)


def test_beside_another_method_that_only_changes_parameters(using: Any) -> None:
    using(ShiftTuner())
    model = get_peft_model(Net().double(), narrow(target_modules=["without"]), "thin", mixed=True)
    model.add_adapter("shift", ShiftConfig(target_modules=["without"]))
    model.set_adapter(["thin", "shift"])
    randomise(model, "shift")
    y = model.eval()(IDS)
    assert not torch.allclose(y, Net().double()(IDS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftcWarning)
        torch.testing.assert_close(model.merge_and_unload()(IDS), y)


def test_files_hold_it(using: Any, tmp_path: Path) -> None:
    using(ShiftTuner())
    model = shifted()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(Net().double(), tmp_path).eval()(IDS), model(IDS))


def test_a_changed_bias_is_no_thin_update(using: Any) -> None:
    using(ShiftTuner())
    with pytest.raises(PeftcError, match="PC543"):
        peftc.convert_adapter(shifted("without"), "NARROW", 2)


@pytest.mark.parametrize(
    ("tuner", "target", "says"),
    [
        (Bends(), "with_bias", "neither a linear map nor one with a constant"),
        (Spares(), "with_bias", "declared to spare the bias"),
        (Everywhere(), "emb", "`emb` has no bias that could take it"),
    ],
)
def test_what_has_no_place_in_weights_is_refused_and_nothing_is_changed(
    tuner: api.MapTuner[Any], target: str, says: str, using: Any
) -> None:
    using(tuner)
    model = shifted(target)
    y, objects = model(IDS), {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(PeftcError, match=rf"(?s)PC508.*{says}.*In the plugin"):
        model.merge_adapter()
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=0)


def test_experts_have_no_bias(using: Any) -> None:
    using(Everywhere())

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ParameterDict({"up": nn.Parameter(torch.randn(3, 4, 5))})

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.experts["up"].mT

    model = get_peft_model(Experts(), ShiftConfig(target_parameters=["experts.up"]))
    with pytest.raises(PeftcError, match=r"(?s)PC508.*has no bias that could take it"):
        model.merge_adapter()


def test_the_form_is_found_whatever_the_slots_hold(using: Any) -> None:
    """A constant that is zero yet, as at the start, is a constant."""
    using(ShiftTuner())
    model = get_peft_model(Net(), ShiftConfig(target_modules=["without"]))
    part = model.get_base_model().without.part("default")
    assert form_of(part.tuner.output, part.view) is Form.AFFINE
    assert form_of(Bends().output, part.view) is Form.NEITHER
    scaled = get_peft_model(Net(), stretch(target_modules=["without"])).get_base_model().without.part("default")
    assert form_of(scaled.tuner.output, scaled.view) is Form.LINEAR
    with pytest.warns(PeftcWarning, match="PC565"):
        model.merge_adapter()
