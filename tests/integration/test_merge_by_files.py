"""A merge that patches files comes to the bits of the merge in memory: for every method, number format and layout of files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from peftc import PeftcError, PeftModel, get_peft_model
from peftc.checkpoint.shards import open_shards
from peftc.integrations.transformers import patchable, streaming
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.subjects import Subject, quiet
from tests.integration import tiny
from tests.integration.test_cli_jobs import run
from tests.runtime.examples import examples, rows
from tests.runtime.methods import METHODS, narrow
from tests.runtime.saving import moved
from tests.unit.fakes import registered


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(*METHODS):
        yield


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def save_base(model: nn.Module, folder: Path, files: int = 1) -> Path:
    """A model's tensors in one file, or in several with an index; what is tied is there once."""
    folder.mkdir()
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[name] = tensor.detach().contiguous()
        seen.add(id(tensor))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    homes = {name: f"model-{place % files + 1}.safetensors" for place, name in enumerate(tensors)}
    for file in set(homes.values()):
        save_file({n: t for n, t in tensors.items() if homes[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged_by_files(base: nn.Module, adapter: Path, place: Path, files: int = 1) -> dict[str, Tensor]:
    """What the files of a merge hold."""
    shards = open_shards(save_base(base, place / "base", files))
    assert shards is not None
    with quiet():
        job = patchable.job_on(adapter, snapshot(base), shards)
        streaming.merge(job, place / "merged", lambda done: None)
    return stored(place / "merged")


def assert_same(found: Mapping[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    different = [
        name
        for name, tensor in expected.items()
        if name in found and (found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor))
    ]
    assert not different
    assert len({id(t) for t in model.state_dict(keep_vars=True).values()}) == len(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("subject", rows(examples(lambda s: s.method.adapts_layers and s.first)))
def test_files_have_the_bits_of_the_merge_in_memory(subject: Subject, dtype: torch.dtype, tmp_path: Path) -> None:
    subject.trained(dtype=dtype).save_pretrained(str(tmp_path / "adapter"))
    with quiet():
        model = PeftModel.from_pretrained(subject.build(dtype), tmp_path / "adapter")
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except PeftcError as error:
            with pytest.raises(PeftcError) as told:
                merged_by_files(subject.build(dtype), tmp_path / "adapter", tmp_path)
            assert [d.code for d in told.value.diagnostics] == [d.code for d in error.diagnostics]
            assert not (tmp_path / "merged").exists()
            return
    assert_same(merged_by_files(subject.build(dtype), tmp_path / "adapter", tmp_path, files=2), merged)
    assert any(not torch.equal(t, merged.state_dict()[n]) for n, t in stored(tmp_path / "base").items())


# Models of transformers, by the command ------------------------------------------------------------------------------------


def save_model(folder: Path, kind: str, dtype: torch.dtype, tied: bool, size: str | None = None) -> Path:
    """A small model with a tokenizer, as transformers saves it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 98, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, intermediate_size=48, tie_word_embeddings=tied, **MORE.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, **({} if size is None else {"max_shard_size": size}))
    tiny.tokenizer().save_pretrained(folder)
    return folder


MORE: Mapping[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2},
    "qwen2": {"num_key_value_heads": 2},
}


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter on it, moved from its start."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with quiet():
        wrapped = get_peft_model(model, narrow(task_type="CAUSAL_LM", **options))
        wrapped.base_model.model.name_or_path = str(base)
        moved(wrapped).save_pretrained(str(folder))
    return folder


def merged(capsys: pytest.CaptureFixture[str], adapter: Path, out: Path, *words: Any) -> dict[str, Any]:
    """What the command says of a merge."""
    code, told, err = run(capsys, "merge", adapter, "-o", out, "--json", "-q", *words)
    assert code == 0, told + err
    found: dict[str, Any] = json.loads(told)
    return found


def compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, adapter: Path, place: Path, *words: Any
) -> tuple[Path, Path]:
    """The folders of a merge by files and of one in memory, which hold the same weights."""
    by_files, in_memory = place / "by_files", place / "in_memory"
    facts = merged(capsys, adapter, by_files, *words)
    assert facts["built"] is False, facts["because"]
    with monkeypatch.context() as patch:
        patch.setattr(patchable, "job_for", needs_model)
        other = merged(capsys, adapter, in_memory, *words)
    assert other["built"] is True and other["because"] == "asked"
    assert {key: facts[key] for key in ("parameters", "dtype")} == {key: other[key] for key in ("parameters", "dtype")}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (by_files, in_memory))
    assert ours.dtype == theirs.dtype
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    assert (by_files / "tokenizer.json").read_bytes() == (in_memory / "tokenizer.json").read_bytes()
    written, expected = stored(by_files), stored(in_memory)
    assert all(
        torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    return by_files, in_memory


def needs_model(*args: Any, **kwargs: Any) -> Any:
    raise patchable.NeedsModel("asked")


#: what an adapter does beside adapting layers, whether the base ties its embeddings, and words of the command
CASES: Mapping[str, tuple[Mapping[str, Any], bool, Sequence[str]]] = {
    "layers": ({"target_modules": ["q_proj", "down_proj"]}, False, ()),
    "layers-tied": ({"target_modules": "all-linear"}, True, ()),
    "head-trained": ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, False, ()),
    "head-trained-tied": ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, True, ()),
    "embeddings-trained-tied": ({"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}, True, ()),
    "norms-trained": ({"target_modules": ["v_proj"], "modules_to_save": ["norm"]}, False, ()),
    "head-untied": ({"target_modules": ["lm_head"]}, True, ("--untie",)),
    "nothing-untied": ({"target_modules": ["q_proj"]}, True, ("--untie",)),
    "head": ({"target_modules": ["lm_head"]}, False, ()),
    "bfloat16": ({"target_modules": ["q_proj"]}, False, ("--dtype", "bfloat16")),
    "bfloat16-tied": ({"target_modules": ["q_proj"]}, True, ("--dtype", "bfloat16")),
}


@pytest.mark.parametrize("size", [None, "20KB"], ids=["one-file", "index"])
@pytest.mark.parametrize("name", CASES)
def test_the_command_comes_to_the_same_model(
    name: str,
    size: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, tied, words = CASES[name]
    base = save_model(tmp_path / "base", "llama", torch.float32, tied, size)
    assert len(list(base.glob("*.safetensors"))) == 1 if size is None else len(list(base.glob("*.safetensors"))) > 2
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    by_files, _ = compared(capsys, monkeypatch, adapter, tmp_path, *words)
    assert not list(by_files.glob("README*"))
