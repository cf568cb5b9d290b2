"""The reference reads what we save and we read what it saves: same names, counts, files, and outputs.

Every case is made by each library in turn, with trainable tensors moved at random, and loaded by the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftc
from peftc.testing.models import MODELS, TinyModel, seeded
from tests.e2e.pairs import shaken

LIBRARIES: Mapping[str, Any] = {"peft": peft, "peftc": peftc}
BOTH_WAYS = [("peft", "peftc"), ("peftc", "peft")]


@dataclass(frozen=True)
class Case:
    """A config class by name, its options, and a tiny model."""

    config: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items() if k != "target_modules")
        return f"{self.config.removesuffix('Config')}-{self.model}-{options}"

    @property
    def tiny(self) -> TinyModel:
        return next(model for model in MODELS if model.name == self.model)

    def made_by(self, library: str, adapter: str = "default") -> nn.Module:
        lib = LIBRARIES[library]
        options = dict(self.options)
        if self.tiny.is_language_model:
            options["task_type"] = "CAUSAL_LM"
        with seeded(5):
            model = lib.get_peft_model(self.tiny.build(), getattr(lib, self.config)(**options), adapter).eval()
        shaken(model)
        return model

    def loaded_by(self, library: str, folder: Path, **options: Any) -> nn.Module:
        return LIBRARIES[library].PeftModel.from_pretrained(self.tiny.build(), str(folder), **options).eval()

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            out = model(**self.tiny.arguments())
        return out if isinstance(out, Tensor) else out.logits


def shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def config_in(folder: Path) -> dict[str, Any]:
    """The saved options; a list of names is a set, and the version is the writer's."""
    data = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    del data["peft_version"]
    return {k: sorted(v) if isinstance(v, list) and all(isinstance(i, str) for i in v) else v for k, v in data.items()}


def lora(model: str, **options: Any) -> Case:
    return Case("LoraConfig", model, {"r": 4, **options})


CASES = [
    lora("mlp", target_modules=["lin0", "lin1"], lora_alpha=3),
    lora("mlp", target_modules="lin[012]", use_rslora=True),
    lora("mlp", target_modules=["lin0", "lin2"], bias="all"),
    lora("mlp", target_modules=["lin0", "lin2"], bias="lora_only"),
    lora("mlp", target_modules=["lin0"], modules_to_save=["lin2", "norm"]),
    lora("mlp", target_modules=["lin0", "lin1"], rank_pattern={"lin1": 2}, alpha_pattern={"lin0": 5}),
    lora("mlp", target_modules=["lin0", "lin1"], init_lora_weights="gaussian"),
    lora("mlp", target_modules=["lin0", "lin1"], init_lora_weights=False),
    lora("conv2d", target_modules=["conv1", "head"]),
    lora("conv1d", target_modules=["conv0"]),
    lora("conv3d", target_modules=["conv0", "head"]),
    lora("embedding", target_modules=["emb", "lin0"]),
    lora("llama"),
    lora("llama", target_modules="all-linear"),
    lora("llama", target_modules=["q_proj", "down_proj"], layers_to_transform=[1], exclude_modules=["down_proj"]),
    lora("llama", target_modules=["embed_tokens", "lm_head", "v_proj"]),
    lora("llama", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    lora("gpt2", fan_in_fan_out=True),
    Case("IA3Config", "mlp", {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}),
    Case("IA3Config", "conv2d", {"target_modules": ["conv0", "conv1"], "feedforward_modules": ["conv0"]}),
    Case("IA3Config", "mlp", {"target_modules": ["lin1"], "feedforward_modules": [], "modules_to_save": ["lin2"]}),
    Case("IA3Config", "llama"),
    Case("IA3Config", "gpt2", {"fan_in_fan_out": True}),
    Case("HRAConfig", "mlp", {"r": 4, "target_modules": ["lin0", "lin1"]}),
    Case("HRAConfig", "mlp", {"r": 4, "target_modules": ["lin0", "lin1"], "bias": "hra_only"}),
    Case("HRAConfig", "conv2d", {"r": 2, "target_modules": ["conv1", "head"], "modules_to_save": ["conv0"]}),
    Case("HRAConfig", "llama", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    Case("PromptTuningConfig", "llama", {"num_virtual_tokens": 5}),
    Case("PromptTuningConfig", "gpt2", {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"}),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # both libraries warn of what a case does on purpose
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_make_the_same_parameters(case: Case) -> None:
    theirs, ours = case.made_by("peft"), case.made_by("peftc")
    assert shapes(ours) == shapes(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(("writer", "reader"), BOTH_WAYS, ids=["peft-to-peftc", "peftc-to-peft"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_reads_what_the_other_saved(case: Case, writer: str, reader: str, tmp_path: Path) -> None:
    made = case.made_by(writer)
    made.save_pretrained(str(tmp_path))
    loaded = case.loaded_by(reader, tmp_path)
    torch.testing.assert_close(case.output(loaded), case.output(made), rtol=1e-4, atol=1e-5)
    refused = reader == "peft" and "num_virtual_tokens" in case.options  # it cannot load these to train on
    training = case.loaded_by(reader, tmp_path, is_trainable=not refused)
    assert shapes(training) == shapes(made)
    assert training.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()
    again = tmp_path / "again"
    training.save_pretrained(str(again))
    mine, theirs = load_file(again / "adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert config_in(again) == config_in(tmp_path)


@pytest.mark.parametrize(("writer", "reader"), BOTH_WAYS, ids=["peft-to-peftc", "peftc-to-peft"])
@pytest.mark.parametrize("case", [CASES[0], CASES[18], CASES[23], CASES[27]], ids=str)
def test_further_adapters_lie_in_folders_of_their_name(case: Case, writer: str, reader: str, tmp_path: Path) -> None:
    made = case.made_by(writer, "second")
    made.save_pretrained(str(tmp_path))
    folder = tmp_path / "second"
    loaded = case.made_by(reader)
    before = case.output(loaded)
    loaded.load_adapter(str(folder), "another")
    torch.testing.assert_close(case.output(loaded), before, rtol=0.0, atol=0.0)
    loaded.set_adapter("another")
    torch.testing.assert_close(case.output(loaded), case.output(made), rtol=1e-4, atol=1e-5)


def test_state_dicts_are_alike_on_both_sides(tmp_path: Path) -> None:
    case = CASES[0]
    theirs, ours = case.made_by("peft"), case.made_by("peftc")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(case.output(ours), case.output(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[23], CASES[27]], ids=str)
def test_loaded_for_inference_nothing_trains(case: Case, tmp_path: Path) -> None:
    """The reference leaves biases and virtual tokens trainable then."""
    case.made_by("peft").save_pretrained(str(tmp_path))
    assert case.loaded_by("peftc", tmp_path).get_nb_trainable_parameters()[0] == 0


@pytest.mark.parametrize("target", ["conv0", "strided"])
def test_a_convolution_keeps_its_geometry(target: str, tmp_path: Path) -> None:
    """The reference forgets padding mode and dilation in its forward, but not in the merged weight: that is what we give."""
    case = lora("conv2d", target_modules=[target])
    theirs = case.made_by("peft")
    theirs.save_pretrained(str(tmp_path))
    ours = case.output(case.loaded_by("peftc", tmp_path))
    assert not torch.allclose(case.output(theirs), ours, atol=1e-3)
    torch.testing.assert_close(case.output(theirs.merge_and_unload()), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("thrifty", [False, True], ids=["plain", "low_cpu_mem_usage"])
@pytest.mark.parametrize(("writer", "reader"), BOTH_WAYS, ids=["peft-to-peftc", "peftc-to-peft"])
def test_a_head_trained_whole_beside_a_base_in_half_precision(
    writer: str, reader: str, thrifty: bool, tmp_path: Path
) -> None:
    """Here it trains in float32, there in the base's format; files hold the latter, which can be loaded in every way."""

    def base() -> Any:
        return case.tiny.build().bfloat16()

    case = lora("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with seeded(5):
        made = LIBRARIES[writer].get_peft_model(base(), getattr(LIBRARIES[writer], case.config)(**case.options)).eval()
    shaken(made)
    made.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: t.dtype for key, t in stored.items() if "lm_head" in key} == {
        "base_model.model.lm_head.weight": torch.bfloat16
    }
    loaded = LIBRARIES[reader].PeftModel.from_pretrained(base(), str(tmp_path), low_cpu_mem_usage=thrifty).eval()
    torch.testing.assert_close(case.output(loaded), case.output(made), rtol=0.02, atol=0.05)
