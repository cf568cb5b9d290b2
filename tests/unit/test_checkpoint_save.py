"""Saving and opening an adapter folder: the ecosystem's layout, readable by it and from it, with ours beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftc import rules
from peftc._version import VERSION
from peftc.checkpoint import load_adapter_tensors, open_adapter, save_adapter
from peftc.checkpoint.load import PICKLE_NAME
from peftc.checkpoint.names import PLAN_NAME, WEIGHTS_NAME
from peftc.checkpoint.report import expected_tensors, match_file
from peftc.checkpoint.values import stored_problems
from peftc.cli import main
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.serial import plan_from_text
from peftc.config.base import CONFIG_NAME, PeftConfig
from peftc.config.files import read_config
from peftc.diagnostics import PeftcError, PeftcWarning
from peftc.tuner.method import TunerMethod
from tests.unit.adapters import examples, injection_plan

EXAMPLES = list(examples())
each_example = pytest.mark.parametrize(("method", "example"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])


def made(method: TunerMethod, example: dict[str, Any]) -> tuple[InjectionPlan, dict[str, Tensor]]:
    """A plan and random tensors for all that it saves."""
    torch.manual_seed(0)
    plan = injection_plan(method, example)
    expected = expected_tensors(plan.adapters[0])
    return plan, {key: torch.randn(facts.shape).to(getattr(torch, facts.dtype)) for key, facts in expected.items()}


def first() -> tuple[PeftConfig, InjectionPlan, dict[str, Tensor]]:
    plan, tensors = made(*EXAMPLES[0][1:])
    return plan.adapters[0].config, plan, tensors


@each_example
def test_an_adapter_comes_back_as_it_was(tmp_path: Path, method: TunerMethod, example: dict[str, Any]) -> None:
    plan, tensors = made(method, example)
    config = plan.adapters[0].config
    before = config.to_dict()
    save_adapter(tmp_path / "a", tensors, config, plan)
    assert config.to_dict() == before
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME, PLAN_NAME]
    found = load_adapter_tensors(tmp_path / "a")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert match_file(plan.adapters[0], open_adapter(tmp_path / "a")).is_clean
    read = read_config(tmp_path / "a")
    assert type(read) is type(config)
    changed = {"inference_mode": True, "peft_version": f"0.21.2@peftc-{VERSION}"}
    assert read.to_dict() == {**before, **changed}
    assert plan_from_text((tmp_path / "a" / PLAN_NAME).read_text()).adapters[0].maps == plan.adapters[0].maps


def test_the_file_is_what_others_expect(tmp_path: Path) -> None:
    config, _, tensors = first()
    save_adapter(tmp_path, tensors, config)
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == (tmp_path / "theirs").read_bytes()
    text = (tmp_path / CONFIG_NAME).read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "torch"])
@each_example
def test_the_reference_reads_what_is_saved(
    tmp_path: Path, method: TunerMethod, example: dict[str, Any], pickled: bool
) -> None:
    peft = pytest.importorskip("peft", reason="the reference is in the test environment only")
    plan, tensors = made(method, example)
    save_adapter(tmp_path, tensors, plan.adapters[0].config, plan, pickled=pickled)
    found = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert config.peft_type.value == plan.adapters[0].peft_type
    assert config.inference_mode is True
    assert config.peft_version.startswith("0.21.2@peftc-")


def test_saving_again_replaces_and_removes_only_what_is_ours(tmp_path: Path) -> None:
    config, plan, tensors = first()
    (tmp_path / "optimizer.pt").write_text("mine")
    save_adapter(tmp_path, tensors, config, plan, {"README.md": "a card"})
    save_adapter(tmp_path, {key: tensor + 1 for key, tensor in tensors.items()}, config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME, "optimizer.pt"]
    found = load_adapter_tensors(tmp_path)
    assert all(torch.equal(found[key], tensors[key] + 1) for key in tensors)


def test_a_loaded_adapter_outlives_the_next_save(tmp_path: Path) -> None:
    """A model holds tensors of the file that it is then saved over."""
    config, _, tensors = first()
    save_adapter(tmp_path, tensors, config)
    held = load_adapter_tensors(tmp_path)
    save_adapter(tmp_path, {key: tensor + 1 for key, tensor in held.items()}, config)
    again = load_adapter_tensors(tmp_path)
    assert all(torch.equal(held[key], tensors[key]) for key in tensors)
    assert all(torch.equal(again[key], tensors[key] + 1) for key in tensors)


def test_a_subfolder(tmp_path: Path) -> None:
    config, _, tensors = first()
    save_adapter(tmp_path / "other", tensors, config)
    assert open_adapter(tmp_path, "other").folder == tmp_path / "other"
    assert open_adapter(tmp_path, subfolder="other", revision="main", unknown=1).tensors.keys() == tensors.keys()


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A hole of 8 GB opens as fast as a small file, without torch."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}}).encode()
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**33)
    code = (
        "import sys; from peftc.checkpoint import open_adapter; "
        "print(open_adapter(sys.argv[1]).tensors['a'].shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == f"({2**31},) False"


def test_what_the_library_wrote_is_opened(tmp_path: Path) -> None:
    _, _, tensors = first()
    save_file(tensors, tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    found = open_adapter(tmp_path)
    assert {key: facts.shape for key, facts in found.tensors.items()} == {k: tuple(t.shape) for k, t in tensors.items()}


def test_the_conversion_that_the_diagnostic_gives_works(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    torch.save({"a": shared, "b": shared.t(), "c": shared[0]}, tmp_path / PICKLE_NAME)
    with pytest.raises(PeftcError, match=rules.CHECKPOINT_PICKLED.code) as caught:
        open_adapter(tmp_path)
    command = caught.value.diagnostics[0].fix.partition("`peftc ")[2].partition("`")[0]
    assert main.main(command.split()) == 0
    found = load_file(tmp_path / WEIGHTS_NAME)
    assert torch.equal(found["b"], shared.t())
    assert set(load_adapter_tensors(tmp_path)) == {"a", "b", "c"}


def test_values_that_look_wrong_are_told(tmp_path: Path) -> None:
    config, _, tensors = first()
    key = next(iter(tensors))
    save_adapter(tmp_path, tensors, config)
    assert list(stored_problems(open_adapter(tmp_path))) == []
    save_adapter(tmp_path, {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}, config)
    assert {d.code for d in stored_problems(open_adapter(tmp_path))} == {rules.UNTRAINED.code}
    tensors[key].view(-1)[0] = float("nan")
    with pytest.warns(PeftcWarning, match=rules.TENSORS_NOT_FINITE.code):
        save_adapter(tmp_path, tensors, config)
    assert [d.code for d in stored_problems(open_adapter(tmp_path))] == [rules.TENSORS_NOT_FINITE.code]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "complex64", "int32"])
def test_dtypes_stay(tmp_path: Path, dtype: str) -> None:
    config, _, _ = first()
    tensor = torch.ones(4).to(getattr(torch, dtype))
    save_adapter(tmp_path, {"a": tensor}, config)
    assert open_adapter(tmp_path).tensor("a").dtype == tensor.dtype
