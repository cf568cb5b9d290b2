"""Files of adapters for the layers that models had under transformers 4, beside what the reference makes of them: written for
today's layers, in sub-folders, with tensors of both layouts, and of methods of strangers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import load_file
from torch import Tensor

from peftc import PeftcError, PeftcWarning, PeftModel, hotswap_adapter, rules, set_peft_model_state_dict
from peftc.checkpoint import former
from peftc.checkpoint.former_layout import FormerAdapter, as_of_then, as_of_today
from peftc.checkpoint.load import open_adapter
from peftc.config.files import read_config
from peftc.plugin import (
    EXPERT_KINDS,
    LINEAR_KINDS,
    ExpertsMixin,
    MapTuner,
    PeftConfig,
    PeftType,
    RankMixin,
    Slot,
    TargetsMixin,
)
from peftc.runtime.applying.snapshot import snapshot
from peftc.tuner.method import TunerMethod
from tests.defects import put_defect
from tests.e2e import test_former_layers as former_layers
from tests.e2e.former import BY_NAME, FAMILIES, ROOT, Family, Old, logits, old_adapter
from tests.integration.test_cli_jobs import run
from tests.unit.fakes import registered

MIXTRAL = BY_NAME["Mixtral"]
pytestmark = pytest.mark.filterwarnings("ignore")


def plain(family: Family) -> Family:
    """The family without dense layers, which the reference takes for experts, where they can be left out."""
    if "mlp_only_layers" not in family.options:
        return family
    options = {key: value for key, value in family.options.items() if key != "mlp_only_layers"}
    return replace(family, options=options, beside=("self_attn.q_proj",))


def today(old: Old, folder: Path) -> FormerAdapter:
    return as_of_today(read_config(old.save(folder)), open_adapter(folder), snapshot(old.family.base))


# written for today's layers ----------------------------------------------------------------------------------------------


#: every family, and those whose layers have the names that the irregular ranks are of
SAVED = [*((family, False) for family in FAMILIES), *((f, True) for f in FAMILIES if f.names == MIXTRAL.names)]


@pytest.mark.parametrize(("family", "irregular"), SAVED, ids=lambda value: getattr(value, "name", str(value)))
def test_it_is_what_a_loaded_model_saves(family: Family, irregular: bool, tmp_path: Path) -> None:
    own = (former_layers.rank_of, former_layers.alpha_of) if irregular else ()
    old = old_adapter(family, *own, **(former_layers.IRREGULAR if irregular else {}))
    made = today(old, tmp_path / "old")
    PeftModel.from_pretrained(copy.deepcopy(family.base), tmp_path / "old").save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert saved.keys() == made.tensors.keys() and all(torch.equal(made.tensors[key], saved[key]) for key in saved)
    assert made.config.to_json() == json.loads((tmp_path / "new" / "adapter_config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tensors_are_those_of_the_references_conversion(family: Family, tmp_path: Path) -> None:
    family = plain(family)
    old = old_adapter(family)
    made = today(old, tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    convert_peft_config_for_transformers(config, family.base, None)
    theirs = convert_peft_adapter_state_dict_for_transformers(family.base, config, dict(old.tensors))
    if family.name == "Phimoe":  # whose router the reference takes for one that is called as in other models
        theirs = {key.replace("mlp.gate.", "mlp.router."): tensor for key, tensor in theirs.items()}
    assert theirs.keys() == made.tensors.keys()
    assert all(torch.equal(made.tensors[key], tensor) for key, tensor in theirs.items())
    if family.name in ("Mixtral", "MiniMax", "Olmoe", "Qwen3Moe"):
        ours: Any = made.config
        for name in ("target_modules", "target_parameters"):
            assert set(getattr(ours, name)) == set(getattr(config, name))
        assert (ours.rank_pattern, ours.alpha_pattern) == (config.rank_pattern, config.alpha_pattern)


@pytest.mark.parametrize("name", ["Phimoe", "Qwen2Moe"])
def test_families_that_the_reference_does_not_load(name: str, tmp_path: Path) -> None:
    old = old_adapter(plain(BY_NAME[name]))
    folder = old.save(tmp_path / "old")
    try:
        theirs = logits(peft.PeftModel.from_pretrained(copy.deepcopy(old.family.base), folder))
        assert not torch.allclose(theirs, logits(old.edited), atol=1e-3)
    except (RuntimeError, ValueError):
        pass
    made = today(old, folder)
    write(made, tmp_path / "new")
    theirs = logits(peft.PeftModel.from_pretrained(copy.deepcopy(old.family.base), tmp_path / "new"))
    torch.testing.assert_close(theirs, logits(old.edited), rtol=1e-4, atol=3e-6)


def write(made: FormerAdapter, folder: Path) -> None:
    from peftc.checkpoint.save import save_adapter

    save_adapter(folder, made.tensors, made.config)


def test_the_command_writes_either_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MIXTRAL.base.save_pretrained(tmp_path / "base")
    old = old_adapter(MIXTRAL, base_model_name_or_path=str(tmp_path / "base"))
    folder = old.save(tmp_path / "old")
    for source, to, out in (
        (folder, "transformers-5", "new"),
        (tmp_path / "new", "transformers-4", "back"),
        (tmp_path / "new", "Transformers-5", "again"),
        (folder, "transformers-4", "same"),
    ):
        code, told, err = run(capsys, "convert", source, "--to", to, "-o", tmp_path / out, "--json")
        assert code == 0 and "PC" not in err, err
        assert json.loads(told)["tensors"] == len(load_file(tmp_path / out / "adapter_model.safetensors"))
    found = {
        name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("new", "back", "again", "same")
    }
    for name in ("back", "same"):
        assert found[name].keys() == old.tensors.keys()
        assert all(torch.equal(found[name][key], tensor) for key, tensor in old.tensors.items())
    assert found["new"].keys() == found["again"].keys()
    assert all(torch.equal(found["again"][key], tensor) for key, tensor in found["new"].items())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), tmp_path / "new")
    torch.testing.assert_close(logits(theirs), logits(old.edited), rtol=1e-4, atol=3e-6)
    code, told, err = run(capsys, "convert", folder, "--to", "transformers-5", "-o", tmp_path / "told")
    assert code == 0 and "for the layers of transformers 5" in told
    code, _, err = run(capsys, "convert", folder, "--to", "transformers-5")
    assert code == 1 and rules.MISSING_KEY.code in err and "`--to transformers-5` needs `--out`" in err
    for place in (folder, tmp_path / "new"):
        code, told, _ = run(capsys, "inspect", place, "--json")
        assert code == 0
        held = load_file(place / "adapter_model.safetensors")
        assert set(json.loads(told)["weights"]["tensors"]) == held.keys()


def test_the_command_makes_thin_factors_of_either_layout_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MIXTRAL.base.save_pretrained(tmp_path / "base")
    old_adapter(MIXTRAL, base_model_name_or_path=str(tmp_path / "base")).save(tmp_path / "old")
    words = ("convert", tmp_path / "old", "--to", "lora", "--rank", "2", "-o", tmp_path / "out")
    code, _, err = run(capsys, *words)
    assert code == 1 and "PC543" in err and "adapts single parameters" in err and not (tmp_path / "out").exists()


def test_what_a_file_lacks_is_told_by_the_command_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MIXTRAL.base.save_pretrained(tmp_path / "base")
    old = old_adapter(
        MIXTRAL,
        left_out=lambda path: "experts.2." in path,
        base_model_name_or_path=str(tmp_path / "base"),
    )
    code, _, err = run(capsys, "convert", old.save(tmp_path / "old"), "--to", "transformers-5", "-o", tmp_path / "new")
    assert code == 0 and "PC607" in err and "experts.2.w1.lora_A.weight" in err
    loaded = PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), tmp_path / "new")
    torch.testing.assert_close(logits(loaded), logits(old.edited), rtol=1e-4, atol=3e-6)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), tmp_path / "old")


# places ------------------------------------------------------------------------------------------------------------------


def test_in_sub_folders(tmp_path: Path) -> None:
    one, two = old_adapter(MIXTRAL), old_adapter(MIXTRAL, seed=5)
    one.save(tmp_path / "all" / "one")
    two.save(tmp_path / "all" / "deep" / "two")
    model = PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), tmp_path / "all", subfolder="one")
    torch.testing.assert_close(logits(model), logits(one.edited), rtol=1e-4, atol=3e-6)
    model.load_adapter(str(tmp_path / "all"), "two", subfolder="deep/two")
    model.set_adapter("two")
    torch.testing.assert_close(logits(model), logits(two.edited), rtol=1e-4, atol=3e-6)


class StrangeConfig(TargetsMixin, ExpertsMixin, RankMixin, PeftConfig):
    """Options of a stranger's method."""

    peft_type: PeftType | None = PeftType("STRANGE")
    r: int = 2


class StrangeTuner(MapTuner[StrangeConfig]):
    """`W' = W + u vᵀ` summed over the rank, each by itself: it knows nothing of experts."""

    supports = LINEAR_KINDS | EXPERT_KINDS

    def slots(self, c: StrangeConfig, layer: Any) -> Any:
        yield Slot("strange_u", (layer.out_features, c.r))
        yield Slot("strange_v", (c.r, layer.in_features))

    def init(self, c: StrangeConfig, layer: Any, slots: Mapping[str, Tensor], init: Any) -> None:
        init.normal(slots["strange_u"])
        init.zeros(slots["strange_v"])

    def thin(self, a: Any) -> tuple[Tensor, Tensor, float]:
        return a.strange_v, a.strange_u, 1.0


STRANGE = TunerMethod(
    "STRANGE",
    StrangeConfig,
    StrangeTuner(),
    layer_names=("strange_u", "strange_v"),
    summary="A method of another package.",
    prefix="strange_",
    examples=({"r": 2, "target_modules": ["w2"]},),
)


def test_a_method_of_a_stranger_in_a_sub_folder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    with registered(STRANGE):
        former_layers.test_slots_of_any_method_on_single_layers_are_stacked(STRANGE, tmp_path)
        old = former_layers.old_of_any_method(STRANGE, ("w2",))
        old.save(tmp_path / "all" / "mine")
        model = PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), tmp_path / "all", subfolder="mine")
        torch.testing.assert_close(logits(model), logits(old.edited), rtol=1e-4, atol=3e-6)
        assert today(old, tmp_path / "here").tensors.keys() == {
            f"{ROOT}model.layers.{layer}.mlp.experts.strange_{slot}" for layer in (0, 1) for slot in "uv"
        }
        with pytest.raises(PeftcError, match=rules.CANNOT_JOIN.code):
            today(former_layers.old_of_any_method(STRANGE, ("w1", "w3")), tmp_path / "joined")


# tensors of both layouts ------------------------------------------------------------------------------------------------


def of_today(old: Old, folder: Path, *parts: str) -> dict[str, Tensor]:
    """Tensors that a layer of today has, with other values."""
    found = today(old, folder).tensors.items()
    return {key: torch.ones_like(tensor) for key, tensor in found if all(part in key for part in parts)}


#: what else a file has, beside all tensors of then
TWICE: Mapping[str, Callable[[Old, Path], dict[str, Tensor]]] = {
    "all": lambda old, folder: of_today(old, folder, ".mlp."),
    "experts of one layer": lambda old, folder: of_today(old, folder, "layers.0.mlp.experts.base_layer"),
    "one tensor": lambda old, folder: of_today(old, folder, "layers.1.mlp.experts.lora_B"),
    "a router": lambda old, folder: of_today(old, folder, "layers.1.mlp.gate"),
    "without the wrapper": lambda old, folder: {
        key.removeprefix(ROOT): tensor + 1 for key, tensor in old.tensors.items() if "experts.1.w3" in key
    },
    "of today and without the wrapper": lambda old, folder: {
        key.removeprefix(ROOT): tensor for key, tensor in of_today(old, folder, "layers.0.mlp.experts").items()
    },
}  # fmt: skip


def twofold(case: str, folder: Path) -> Old:
    old = old_adapter(MIXTRAL)
    more = TWICE[case](old, folder / "first")
    assert more
    return Old(MIXTRAL, {**old.tensors, **more}, old.config, old.edited)


@pytest.mark.parametrize("case", TWICE)
def test_tensors_under_names_of_two_layouts_are_refused(case: str, tmp_path: Path) -> None:
    bad = twofold(case, tmp_path)
    base = copy.deepcopy(MIXTRAL.base)
    folder = bad.save(tmp_path / "bad")
    says = rf"(?s){rules.KEYS_COLLIDE.code}.*of the same layer.*adapter_model.safetensors"
    with pytest.raises(PeftcError, match=says):
        PeftModel.from_pretrained(base, folder)
    assert {name for name, _ in base.named_parameters()} == {name for name, _ in MIXTRAL.base.named_parameters()}
    for write_as in (as_of_today, as_of_then):
        with pytest.raises(PeftcError, match=says):
            write_as(read_config(folder), open_adapter(folder), snapshot(MIXTRAL.base))
    good = old_adapter(MIXTRAL).save(tmp_path / "good")
    model = PeftModel.from_pretrained(base, good)
    y = logits(model)
    if "wrapper" not in case:  # there either name may be given
        with pytest.raises(PeftcError, match=rules.KEYS_COLLIDE.code):
            set_peft_model_state_dict(model, bad.tensors)
        with pytest.raises(PeftcError, match=rules.KEYS_COLLIDE.code):
            hotswap_adapter(model, folder, "default")
    assert torch.equal(logits(model), y)


def test_layers_of_one_layout_each_are_no_collision(tmp_path: Path) -> None:
    old = old_adapter(MIXTRAL)
    kept = {key: tensor for key, tensor in old.tensors.items() if "layers.0.block_sparse_moe" not in key}
    more = {key: tensor for key, tensor in today(old, tmp_path / "first").tensors.items() if "layers.0.mlp" in key}
    mixed = Old(MIXTRAL, {**kept, **more}, old.config, old.edited)
    model = PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), mixed.save(tmp_path / "mixed"))
    torch.testing.assert_close(logits(model), logits(old.edited), rtol=1e-4, atol=3e-6)


def test_the_reference_takes_one_of_the_two_without_a_word(tmp_path: Path) -> None:
    bad = twofold("all", tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), bad.save(tmp_path / "bad"))
    assert not torch.allclose(logits(theirs), logits(bad.edited), atol=0.1)


@pytest.mark.parametrize(
    ("before", "after", "case"),
    [
        ("if name in keys:", "if False:", "without the wrapper"),
        ("twice += self._of_both_layouts(renamed, joints, found)", "pass", "one tensor"),
        ("if twice:", "if False:", "a router"),
        ("if key not in own)", "if key in own)", "a router"),
    ],
)
def test_defects_are_found(before: str, after: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, former, before, after)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_tensors_under_names_of_two_layouts_are_refused(case, tmp_path)


def test_an_expert_that_the_model_does_not_have_is_told(tmp_path: Path) -> None:
    old = old_adapter(MIXTRAL)
    more = {key.replace("experts.0", "experts.9"): t.clone() for key, t in old.tensors.items() if "experts.0.w1" in key}
    many = Old(MIXTRAL, {**old.tensors, **more}, old.config, old.edited)
    with pytest.warns(PeftcWarning, match=r"(?s)PC608.*experts\.9\.w1"):
        model = PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), many.save(tmp_path))
    torch.testing.assert_close(logits(model), logits(old.edited), rtol=1e-4, atol=3e-6)
