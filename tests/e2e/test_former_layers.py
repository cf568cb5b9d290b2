"""Adapters of transformers 4 for mixture-of-experts models: loaded exactly by every way, and written back exactly."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftc import (
    LoraConfig,
    PeftcError,
    PeftcWarning,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    inject_adapter_in_model,
    rules,
    set_peft_model_state_dict,
)
from peftc.checkpoint.former_layout import as_of_then
from peftc.checkpoint.load import open_adapter
from peftc.cli import main
from peftc.config.files import read_config
from peftc.config.mixins import ExpertsMixin
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.tuner.method import TunerMethod
from tests.e2e.former import BY_NAME, FAMILIES, ROOT, Family, Old, former_weights, logits, old_adapter

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
METHODS = [default_registry().get(name) for name in default_registry().names]
MIXTRAL, DEEPSEEK = BY_NAME["Mixtral"], BY_NAME["DeepseekV3"]
EXACT = {"rtol": 1e-5, "atol": 2e-6}
pytestmark = pytest.mark.filterwarnings("ignore::peftc.diagnostics.PeftcWarning")  # routers are adapted


def loaded(old: Old, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(old.family.base), old.save(folder))


def assert_same(model: nn.Module, old: Old) -> None:
    wanted = logits(old.edited)
    assert (wanted - logits(old.family.base)).abs().max() > 0.02
    torch.testing.assert_close(logits(model), wanted, **EXACT)


@each_family
def test_loaded_merged_saved_again_and_written_back(family: Family, tmp_path: Path) -> None:
    old = old_adapter(family)
    model = loaded(old, tmp_path / "old")
    assert_same(model, old)
    model.save_pretrained(tmp_path / "new")
    assert_same(PeftModel.from_pretrained(copy.deepcopy(family.base), tmp_path / "new"), old)
    back = as_of_then(read_config(tmp_path / "new"), open_adapter(tmp_path / "new"), snapshot(family.base))
    assert {key: tensor.shape for key, tensor in back.tensors.items()} == {k: t.shape for k, t in old.tensors.items()}
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in old.tensors.items())
    now = back.config.to_dict()
    assert {name: now[name] for name in ("r", "lora_alpha", "rank_pattern")} == {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {},
    }
    assert set(now["target_modules"]) == set(family.targets)
    assert not now["target_parameters"]
    assert_same(model.merge_and_unload(), old)


@each_family
def test_joined_to_a_model_that_has_adapters(family: Family, tmp_path: Path) -> None:
    old = old_adapter(family)
    model = loaded(old, tmp_path)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert_same(model, old)


SCRIPT = """
import peftc.compat; peftc.compat.install()
import copy, sys, torch, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from tests.e2e.former import FAMILIES, logits, old_adapter
from tests.e2e.test_former_layers import IRREGULAR, alpha_of, rank_of
made = {family.name: old_adapter(family) for family in FAMILIES}
made["irregular"] = old_adapter(FAMILIES[0], rank_of, alpha_of, **IRREGULAR)
for name, old in made.items():
    model = copy.deepcopy(old.family.base)
    model.load_adapter(str(old.save(Path(sys.argv[1], name))))
    print(name, float((logits(model) - logits(old.edited)).abs().max()))
"""


def test_transformers_own_load_adapter_under_the_alias(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    off = {name: float(by) for name, by in (line.split() for line in done.stdout.splitlines())}
    assert off.keys() == {*BY_NAME, "irregular"}
    assert max(off.values()) < 2e-6, off


def test_swapped_in(tmp_path: Path) -> None:
    other = old_adapter(MIXTRAL, seed=5)
    model = loaded(old_adapter(MIXTRAL), tmp_path / "one")
    hotswap_adapter(model, other.save(tmp_path / "other"), "default")
    assert_same(model, other)


def rank_of(path: str) -> int:
    return 4 if path.endswith("experts.1.w1") else 3 if path.endswith("w2") else 2


def alpha_of(path: str) -> float:
    return 10 if path.endswith("experts.2.w3") else 4


IRREGULAR = {"rank_pattern": {r"experts\.1\.w1": 4, "w2": 3}, "alpha_pattern": {"experts.2.w3": 10}}


@pytest.mark.parametrize("rooted", [False, True])
def test_ranks_and_scalings_of_single_layers(rooted: bool, tmp_path: Path) -> None:
    old = old_adapter(MIXTRAL, rank_of, alpha_of, use_rslora=rooted, **IRREGULAR)
    model = loaded(old, tmp_path / "old")
    assert_same(model, old)
    model.save_pretrained(tmp_path / "new")
    back = as_of_then(read_config(tmp_path / "new"), open_adapter(tmp_path / "new"), snapshot(MIXTRAL.base))
    written = Old(MIXTRAL, {key: t.clone() for key, t in back.tensors.items()}, back.config.to_json(), old.edited)
    assert_same(loaded(written, tmp_path / "written"), old)


def test_what_a_file_lacks_stays_as_in_the_base_and_is_told(tmp_path: Path) -> None:
    old = old_adapter(MIXTRAL, left_out=lambda path: path.endswith(("experts.0.w1", "experts.3.w2")))
    with pytest.warns(PeftcWarning, match=rf"(?s){rules.KEYS_MISSING.code}.*experts.3.w2.lora_A"):
        model = loaded(old, tmp_path)
    assert_same(model, old)


def test_a_trained_adapter_of_today_is_written_for_the_layers_of_then(tmp_path: Path) -> None:
    fused = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=fused, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(MIXTRAL.base), config)
    model.save_pretrained(tmp_path / "new")
    back = as_of_then(read_config(tmp_path / "new"), open_adapter(tmp_path / "new"), snapshot(MIXTRAL.base))
    assert set(back.config.target_modules) == {"q_proj", "w1", "w2", "w3"}
    assert {tensor.shape[0] for key, tensor in back.tensors.items() if "lora_A" in key} == {3}
    written = Old(MIXTRAL, {key: t.clone() for key, t in back.tensors.items()}, back.config.to_json(), model)
    again = loaded(written, tmp_path / "old")
    torch.testing.assert_close(logits(again), logits(model), **EXACT)


def test_names_that_would_mean_more_become_an_expression(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(DEEPSEEK.base), config)
    model.save_pretrained(tmp_path)
    back = as_of_then(read_config(tmp_path), open_adapter(tmp_path), snapshot(DEEPSEEK.base))
    assert back.config.target_modules == r"model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MIXTRAL.base.save_pretrained(tmp_path / "base")
    old = old_adapter(MIXTRAL, base_model_name_or_path=str(tmp_path / "base"))
    folder = old.save(tmp_path / "old")
    assert main.main(["inspect", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["weights"]["tensors"]) == len(old.tensors)
    assert main.main(["merge", "--adapter", str(folder), "-o", str(tmp_path / "merged"), "-q"]) == 0
    from transformers import AutoModelForCausalLM

    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), old)
    loaded(old, tmp_path / "old").save_pretrained(tmp_path / "new")
    words = ["convert", str(tmp_path / "new"), "--to", "transformers-4", "-q"]
    assert main.main(words) == 1
    assert rules.MISSING_KEY.code in capsys.readouterr().err
    assert main.main([*words, "-o", str(tmp_path / "back")]) == 0
    found = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert found.keys() == old.tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in old.tensors.items())
    assert "PC" not in capsys.readouterr().err
    assert main.main(["inspect", str(tmp_path / "back")]) == 0


BAD: dict[str, tuple[Any, str]] = {
    "another width": (
        lambda t: {k: v[:, :-1] if "w1.lora_A" in k else v for k, v in t.items()},
        rules.SHAPES_DIFFER.code,
    ),
    "another rank": (
        lambda t: {k: v[:1] if "experts.2.w1.lora_A" in k else v for k, v in t.items()},
        rules.SHAPES_DIFFER.code,
    ),
}


@pytest.mark.parametrize("change", BAD)
def test_what_does_not_fit_is_refused_and_nothing_loaded(change: str, tmp_path: Path) -> None:
    old = old_adapter(MIXTRAL)
    changed, code = BAD[change]
    bad = Old(MIXTRAL, {key: t.contiguous() for key, t in changed(old.tensors).items()}, old.config, old.edited)
    base = copy.deepcopy(MIXTRAL.base)
    before = logits(base)
    with pytest.raises(PeftcError, match=code):
        PeftModel.from_pretrained(base, bad.save(tmp_path))
    assert [type(module) for module in base.modules()] == [type(module) for module in MIXTRAL.base.modules()]
    torch.testing.assert_close(logits(base), before, rtol=0, atol=0)


def stackable() -> list[TunerMethod]:
    """Methods on single layers of experts whose mathematics the core stacks."""
    return [m for m in METHODS if m.adapts_layers and issubclass(m.config, ExpertsMixin)]


def old_of_any_method(method: TunerMethod, names: tuple[str, ...]) -> Old:
    """An adapter of then on some of each expert's layers: what each does to its weight is asked of the layer alone."""
    options = {key: value for key, value in method.examples[0].items() if key != "target_modules"}
    edited = copy.deepcopy(MIXTRAL.base)
    tensors: dict[str, torch.Tensor] = {}
    for path, weight in former_weights(MIXTRAL, edited):
        if path.rpartition(".")[2] not in names:
            continue
        layer = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=False)})
        layer["layer"].weight.data.copy_(weight)
        model = get_peft_model(layer, method.config(**{**options, "target_modules": ["layer"]}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * 0.5
        for key, tensor in get_peft_model_state_dict(model).items():
            tensors[key.replace("base_model.model.layer.", f"base_model.model.{path}.")] = tensor.detach().clone()
        with torch.no_grad():
            weight.copy_(model.merge_and_unload()["layer"].weight)
    config = method.config(**{**options, "target_modules": list(names), "inference_mode": True}).to_json()
    return Old(MIXTRAL, tensors, config, edited)


@pytest.mark.parametrize("method", stackable(), ids=lambda method: method.peft_type)
def test_slots_of_any_method_on_single_layers_are_stacked(method: TunerMethod, tmp_path: Path) -> None:
    torch.manual_seed(3)
    old = old_of_any_method(method, ("w2",))
    model = loaded(old, tmp_path / "old")
    assert (logits(old.edited) - logits(old.family.base)).abs().max() > 5e-4
    torch.testing.assert_close(logits(model), logits(old.edited), rtol=1e-4, atol=3e-6)
    model.save_pretrained(tmp_path / "new")
    back = as_of_then(read_config(tmp_path / "new"), open_adapter(tmp_path / "new"), snapshot(MIXTRAL.base))
    assert back.tensors.keys() == old.tensors.keys()
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in old.tensors.items())
    assert set(back.config.target_modules) == {"w2"}


@pytest.mark.parametrize("method", stackable())
def test_methods_that_cannot_join_layers_say_so(method: TunerMethod, tmp_path: Path) -> None:
    old = old_of_any_method(method, ("w1", "w3"))
    with pytest.raises(PeftcError, match=rf"{rules.CANNOT_JOIN.code}(?s:.*){method.peft_type} on `w1`, `w3`"):
        loaded(old, tmp_path)


@pytest.mark.parametrize("options", [{}, IRREGULAR], ids=["alike", "ranks of single layers"])
def test_put_into_a_model_and_its_state_set(options: dict[str, Any], tmp_path: Path) -> None:
    old = old_adapter(MIXTRAL, *((rank_of, alpha_of) if options else ()), **options)
    config = LoraConfig.from_pretrained(old.save(tmp_path))
    model = inject_adapter_in_model(config, copy.deepcopy(MIXTRAL.base))
    outcome = set_peft_model_state_dict(model, {key.removeprefix(ROOT): t for key, t in old.tensors.items()})
    assert not outcome.missing_keys and not outcome.unexpected_keys
    assert_same(model, old)


@pytest.mark.parametrize("name", ["Mixtral", "MiniMax", "Olmoe"])
def test_joint_tensors_are_the_references_bit_for_bit(name: str, tmp_path: Path) -> None:
    old = old_adapter(BY_NAME[name])
    ours = get_peft_model_state_dict(loaded(old, tmp_path))
    theirs = peft.get_peft_model_state_dict(
        peft.PeftModel.from_pretrained(copy.deepcopy(old.family.base), tmp_path)  # type: ignore[arg-type]
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_rslora": True},
        {"alpha": lambda path: 10 if path.endswith("w3") else 4, "alpha_pattern": {"w3": 10}},
    ],
    ids=["use_rslora", "alpha_pattern"],
)
def test_scalings_that_the_reference_loses(adapter: dict[str, Any], tmp_path: Path) -> None:
    old = old_adapter(MIXTRAL, **adapter)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), old.save(tmp_path))  # type: ignore[arg-type]
    assert (logits(theirs) - logits(old.edited)).abs().max() > 0.01
    assert_same(loaded(old, tmp_path), old)


LOST = {
    "rank_pattern": ({"rank": lambda path: 3 if path.endswith("w2") else 2, "rank_pattern": {"w2": 3}}, RuntimeError),
    "one of two layers": (
        {"left_out": lambda path: path.endswith("w3"), "target_modules": ["gate", "q_proj", "w1", "w2"]},
        ValueError,
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_adapters_that_the_reference_refuses(case: str, tmp_path: Path) -> None:
    options, error = LOST[case]
    old = old_adapter(MIXTRAL, **options)  # type: ignore[arg-type]
    with pytest.raises(error):
        peft.PeftModel.from_pretrained(copy.deepcopy(MIXTRAL.base), old.save(tmp_path))  # type: ignore[arg-type]
    assert_same(loaded(old, tmp_path), old)


def test_the_state_of_a_wrapped_model_is_set(tmp_path: Path) -> None:
    old = old_adapter(MIXTRAL, alpha=lambda path: 10 if path.endswith("w2") else 4, alpha_pattern={"w2": 10})
    model = get_peft_model(copy.deepcopy(MIXTRAL.base), LoraConfig.from_pretrained(old.save(tmp_path)))
    outcome = set_peft_model_state_dict(model, old.tensors)
    assert not outcome.missing_keys and not outcome.unexpected_keys
    assert_same(model, old)
