"""Variants of methods: those that a method brings, those that others bring, and what is refused of both."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peftc import plugin as p
from peftc import rules
from peftc.cli.main import main
from peftc.config.spec import load_spec
from peftc.diagnostics import Diagnostic, PeftcError, Rule
from peftc.model.functions.hotswap import hotswap_adapter
from peftc.model.mapping import get_peft_model
from peftc.model.peft_model import PeftModel
from peftc.registry import contract, door, manager, variants
from peftc.registry.manager import Claim, Registry, default_registry
from peftc.registry.variants import Variants
from peftc.tuner import variant as records
from tests.defects import put_defect
from tests.unit.fakes import FakeTuner, record


class VariedConfig(p.VariantMixin, p.LayersConfig):
    """A method with options for two variants of its own."""

    peft_type: p.PeftType | None = p.PeftType("VARIED")
    halve: bool = False
    """Half of it."""
    negate: bool = False
    """The opposite."""


class Scale(p.MapTuner[VariedConfig]):
    supports = p.LINEAR_KINDS
    factor = 1.0

    def slots(self, c: VariedConfig, layer: p.LayerFacts) -> p.Slots:
        yield p.parameter_slot("varied_v", (layer.out_features,))

    def init(self, c: VariedConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        init.ones(slots["varied_v"])

    def output(self, a: p.View, y: p.Tensor) -> p.Tensor:
        return y * a.varied_v * self.factor


class Half(Scale):
    factor = 0.5


class Opposite(Scale):
    factor = -1.0


class ShiftOptions(p.ConfigModel):
    by: float = p.Field(default=1.0, gt=0)


class Shift(Scale):
    """Adds a number, with a slot more."""

    def slots(self, c: VariedConfig, layer: p.LayerFacts) -> p.Slots:
        yield from super().slots(c, layer)
        yield p.parameter_slot("varied_shift", (layer.out_features,))

    def init(self, c: VariedConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        super().init(c, layer, slots, init)
        init.fill(slots["varied_shift"], p.variant_options(c, ShiftOptions).by)

    def output(self, a: p.View, y: p.Tensor) -> p.Tensor:
        return y * a.varied_v + a.varied_shift


METHOD = p.method(
    VariedConfig,
    Scale(),
    variants=(
        p.Variant("VARIED", "half", Half(), chosen=lambda c: c.halve, option="halve"),
        p.Variant("VARIED", "opposite", (Opposite(),), chosen=lambda c: c.negate, option="negate"),
    ),
    prefix="varied_",
    layer_names=("varied_v",),
    identity_at_start=lambda c: False,
)


def refuses(c: VariedConfig) -> p.Problems:
    if p.variant_options(c, ShiftOptions).by == 13:
        yield p.rules.BAD_VALUE("13 is no number to shift by", fix="Use another.", where="variant_options")


SHIFT: p.Variant[Any] = p.Variant(
    "VARIED", "shift", Shift(), options=ShiftOptions, check=refuses, layer_names=("varied_shift",)
)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The method and the stranger's variant, known to this process."""
    registry = default_registry()
    p.register_plugin(METHOD)
    p.register_variant(SHIFT)
    registry.variants._broken.clear()
    yield registry
    p.unregister_variant(SHIFT)
    registry.forget("VARIED")


def wrapped(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(3, 2)), VariedConfig(target_modules=["0"], **options))


@pytest.mark.parametrize(
    ("options", "factor", "shift"),
    [({}, 1, 0), ({"halve": True}, 0.5, 0), ({"negate": True}, -1, 0), ({"variant": "shift"}, 1, 1),
     ({"variant": "shift", "variant_options": {"by": 2.5}}, 1, 2.5)],
)  # fmt: skip
def test_one_acts(known: Registry, options: dict[str, Any], factor: float, shift: float, tmp_path: Path) -> None:
    model, x = wrapped(**options), torch.ones(1, 3)
    layer = model.get_base_model()[0]
    y = model(x)
    torch.testing.assert_close(y, layer.base_layer(x) * factor + shift)
    assert ("varied_shift" in layer.adapter_layer_names) is (shift != 0)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name for name in written if name.startswith("variant")} == {n for n in options if n.startswith("variant")}
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 2)), tmp_path)
    torch.testing.assert_close(again(x), y)
    torch.testing.assert_close(again.merge_and_unload()(x), y)


def test_two_adapters_of_two_variants_on_one_layer(known: Registry) -> None:
    model, x = wrapped(), torch.ones(1, 3)
    base = model.get_base_model()[0].base_layer(x)
    model.add_adapter("second", VariedConfig(target_modules=["0"], halve=True))
    model.add_adapter("third", VariedConfig(target_modules=["0"], variant="shift"))
    for name, expected in (("default", base), ("second", base / 2), ("third", base + 1)):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), expected)


def test_one_of_a_stranger_is_swapped_for_its_like(known: Registry, tmp_path: Path) -> None:
    model, x = wrapped(variant="shift"), torch.ones(1, 3)
    other = wrapped(variant="shift", variant_options={"by": 4.0})
    other.save_pretrained(tmp_path)
    wanted = other(x)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), wanted)


def told(act: Callable[[], object]) -> list[Diagnostic]:
    with pytest.raises(PeftcError) as caught:
        act()
    return list(caught.value.diagnostics)


def invalid(**changes: Any) -> Callable[[], object]:
    fields = {"peft_type": "VARIED", "name": "x", "tuner": Shift(), **changes}
    return lambda: Variants((), frozenset()).register(p.Variant(**fields))


def spoken(answer: object) -> Callable[[], object]:
    @p.hookimpl
    def peftc_variant() -> object:
        return answer

    return lambda: Variants((), frozenset()).register(SimpleNamespace(peftc_variant=peftc_variant), "varied.x")


def claimed(*claims: Claim, blocked: frozenset[str] = frozenset()) -> Callable[[], object]:
    return lambda: Variants(claims, blocked).get("varied.x")


def of(distribution: str, module: str = "nowhere") -> Claim:
    return Claim("varied.x", module, distribution, "1.0")


#: name -> what is done, the rule, what is said, and a defect under which it is not
CASES: dict[str, tuple[Callable[[], object], Rule, str, ModuleType, str, str]] = {
    "unknown": (lambda: wrapped(variant="shfit"), rules.UNKNOWN_VARIANT, "Did you mean `shift`?", variants, "did_you_mean(name, known)", "''"),
    "two of them": (lambda: wrapped(halve=True, negate=True), rules.CONTRADICTION, "`halve` and `negate`", records, "if len(chosen) > 1:", "if False:"),
    "two, one of a stranger": (lambda: wrapped(halve=True, variant="shift"), rules.CONTRADICTION, "`halve` and `variant`", records, "if len(chosen) > 1:", "if False:"),
    "options of none": (lambda: wrapped(variant_options={"by": 2}), rules.BAD_VALUE, "`variant_options` needs `variant`", __import__("peftc.config.mixins", fromlist=["x"]), "if self.variant_options and not self.variant:", "if False:"),
    "an unknown option": (lambda: wrapped(variant="shift", variant_options={"bye": 2}), rules.BAD_VALUE, "In `variant_options`: `ShiftOptions` has no option `bye`", records, "if self.options is not None:", "if False:"),
    "a wrong option": (lambda: wrapped(variant="shift", variant_options={"by": -2.0}), rules.BAD_VALUE, "In `variant_options`: `by` cannot be `-2.0`", records, "if self.options is not None:", "if False:"),
    "what the variant refuses": (lambda: wrapped(variant="shift", variant_options={"by": 13.0}), rules.BAD_VALUE, "13 is no number", records, "yield from self.check(config)", "self.check(config)"),
    "no hook": (spoken(None), rules.PLUGIN_INVALID, "called `peftc_variant`", contract, "if variant is None:", "if False:"),
    "not a variant": (spoken(3), rules.PLUGIN_INVALID, "returned a `int`", contract, "if not isinstance(variant, Variant):", "if variant is None:"),
    "another name": (spoken(SHIFT), rules.PLUGIN_INVALID, "the record says `varied.shift`", contract, "if key and own != key:", "if False:"),
    "a field of another type": (invalid(layer_names="x"), rules.PLUGIN_INVALID, "`layer_names`", contract, "yield f\"`{name}` is {value!r:.60}, not {wanted}\"", "yield ''"),
    "options without names": (invalid(chosen_by=("x",)), rules.PLUGIN_INVALID, "options by name", contract, "yield f\"`{name}` is {value!r:.60}, not {wanted}\"", "yield ''"),
    "no kinds": (invalid(tuner=type("T", (Scale,), {"supports": ()})()), rules.PLUGIN_INVALID, "frozenset of `Kind`", contract, "_of_no_kinds(variant.tuners)", "()"),
    "chosen by itself": (invalid(chosen=lambda c: True), rules.PLUGIN_INVALID, "others go by name", contract, 'return "" if variant.chosen is None else', 'return "" if True else'),
    "two claims": (claimed(of("one"), of("two")), rules.PLUGIN_CONFLICT, "nowhere from one 1.0; nowhere from two", door, "if len(claims) > 1:", "if False:"),
    "a blocked one": (claimed(of("one"), blocked=frozenset({"varied.x"})), rules.PLUGIN_BLOCKED, "Take `varied.x` out", door, "if not claims and hidden:", "if False:"),
    "a broken one": (claimed(of("one")), rules.PLUGIN_BROKEN, "ModuleNotFoundError", door, "raise PeftcError(rules.PLUGIN_BROKEN(what, fix=fix)) from error\n        return self._accept", "raise\n        return self._accept"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_ends_in_its_diagnostic(known: Registry, name: str) -> None:
    act, rule, says, *_ = CASES[name]
    (found,) = told(act)
    assert found.code == rule.code
    assert says in f"{found.what} {found.fix}"
    assert found.fix


@pytest.mark.parametrize("name", CASES)
def test_a_defect_would_be_noticed(known: Registry, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, rule, says, module, before, after = CASES[name]
    put_defect(monkeypatch, module, before, after)
    try:
        act()
    except PeftcError as error:
        assert not [d for d in error.diagnostics if d.code == rule.code and says in f"{d.what} {d.fix}"]
    except Exception:  # with the defect anything may happen, except for the diagnostic
        return


def test_a_spec_is_told_of_it_with_its_line(known: Registry, tmp_path: Path) -> None:
    spec = "version: 1\nbase: {path: x}\nadapters:\n  a:\n    peft_type: VARIED\n    target_modules: [x]\n    variant: shfit\n"
    (tmp_path / "spec.yaml").write_text(spec)
    (found,) = told(lambda: load_spec(tmp_path / "spec.yaml"))
    assert (found.code, found.where.line) == (rules.UNKNOWN_VARIANT.code, 7)


def test_a_file_says_what_to_install(known: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(variant="shift").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peftc_plugin": "their-shift==2.0"}))
    monkeypatch.delitem(known.variants._records, "varied.shift")
    (found,) = told(lambda: PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 2)), tmp_path))
    monkeypatch.undo()
    assert found.code == rules.PLUGIN_MISSING.code
    assert "`shift` is a variant of VARIED" in found.what
    assert "pip install their-shift==2.0" in found.fix


def test_installed_variants_are_known_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_variant.py").write_text(
        "from peftc import plugin as p\nfrom tests.unit.test_variants import Shift\n"
        "@p.hookimpl\ndef peftc_variant():\n    return p.Variant('VARIED', 'theirs', Shift())\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peftc.variants]\nvaried.theirs = their_variant\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Registry(blocked=frozenset())
    assert "varied.theirs" in made.variants.names
    assert "their_variant" not in sys.modules
    made.register(METHOD)
    config = VariedConfig(variant="theirs")
    method = made.method_of(config)
    assert method is made.method_of(config)
    assert "their_variant" in sys.modules
    assert method.variant_for(config) is made.variants.get("varied.theirs")
    from peftc.registry.origin import requirement_of

    assert requirement_of("VARIED", made, "theirs") == "theirs==1.0"


def test_methods_without_variants_are_as_before() -> None:
    method = record()
    assert isinstance(method.only_tuner, FakeTuner)
    assert method.map_tuners == (method.tuner,)
    assert manager.Registry((), frozenset()).variants.names == ()


def test_they_are_listed_with_what_is_wrong(
    known: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry((), frozenset())
    registry.__dict__["variants"] = Variants([of("one"), of("two"), Claim("varied.y", "nowhere", "one", "1.0")], None)
    monkeypatch.setattr(manager, "default_registry", lambda: registry)
    assert main(["plugins", "--check", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(row["peft_type"], row["state"]) for row in told["plugins"]] == [
        ("varied.x", "conflict"),
        ("varied.x", "conflict"),
        ("varied.y", "broken"),
    ]
    assert {problem["code"] for problem in told["diagnostics"]} == {
        rules.PLUGIN_CONFLICT.code,
        rules.PLUGIN_BROKEN.code,
    }


def test_a_methods_own_are_shown_with_their_options(known: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "VARIED"]) == 0
    shown = capsys.readouterr().out
    assert "VARIANT BY" in shown and "halve" in shown
