"""A merge that patches files comes to the bits of the merge in memory: for every method, number format and layout of files."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from peftc import PeftcError, PeftModel, get_peft_model, rules
from peftc.checkpoint import patched
from peftc.checkpoint.shards import open_shards
from peftc.graph.base_ref import BaseRef
from peftc.graph.nodes import Kind
from peftc.integrations.transformers import patchable, streaming
from peftc.integrations.transformers.graph import graph_of
from peftc.model.parts import identity
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.subjects import Subject, quiet
from peftc.tuner.method import TunerMethod
from tests.defects import put_defect
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


METHODS_OF_ALL = tuple(map(default_registry().get, default_registry().names))
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
    assert (by_files / "tokenizer.json").read_bytes() == (place / "base" / "tokenizer.json").read_bytes()
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


def embedding_method(follows: bool) -> TunerMethod:
    """A method that adapts embeddings and merges: one whose tensors tied layers share, or not."""
    found = map(default_registry().get, default_registry().names)
    return next(
        method
        for method in found
        if Kind.EMBEDDING in method.supports and method.follows_ties is follows and method.examples
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("follows", [False, True], ids=["alone", "follows-ties"])
def test_adapted_embeddings(
    follows: bool, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = embedding_method(follows)
    base = save_model(tmp_path / "base", "llama", torch.bfloat16, tied)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    options = {**method.examples[0], "task_type": "CAUSAL_LM"}
    options |= {"target_modules": ["embed_tokens"]} if "target_modules" in method.config.model_fields else {}
    with quiet():
        moved(get_peft_model(model, method.config(**options))).save_pretrained(
            str(tmp_path / "adapter"), save_embedding_layers=False
        )
    words = ("--base", base, *(("--untie",) if tied and not follows else ()))
    if words[2:]:
        code, told, _ = run(
            capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "refused", "--json", "-q", *words[:2]
        )
        assert code == 1 and rules.TIE_BROKEN.code in told and not (tmp_path / "refused").exists()
    compared(capsys, monkeypatch, tmp_path / "adapter", tmp_path, *words)


def test_both_names_of_a_tied_weight_in_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model(tmp_path / "base", "llama", torch.float32, tied=True)
    tensors = stored(base)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["v_proj"], modules_to_save=["embed_tokens"])
    by_files, _ = compared(capsys, monkeypatch, adapter, tmp_path)
    assert "lm_head.weight" in stored(by_files)


def test_trained_biases_and_embeddings_that_come_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model(tmp_path / "base", "qwen2", torch.bfloat16, tied=False)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    method = next(m for m in METHODS_OF_ALL if m.is_rankable and "bias" in m.config.model_fields)
    config = method.least(target_modules=["q_proj", "down_proj"], bias="all", task_type="CAUSAL_LM")
    with quiet():
        moved(get_peft_model(model, config)).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    by_files, _ = compared(capsys, monkeypatch, tmp_path / "adapter", tmp_path, "--base", base)
    before, after = stored(base), stored(by_files)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.bias"} <= changed
    assert "model.layers.0.self_attn.k_proj.weight" not in changed


# what is not patched ---------------------------------------------------------------------------------------------------------


def as_pickle(base: Path) -> None:
    torch.save(stored(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def without_prefix(base: Path) -> None:
    tensors = {name.removeprefix("model."): tensor for name, tensor in stored(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def without_class(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": None}))


def torn_ties(base: Path) -> None:
    tensors = stored(base)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
        base / "model.safetensors",
        {"format": "pt"},
    )


#: what is done to the files of a base, its kind, whether it is tied, the layers that are adapted, and the reason that is told
NEEDED: Mapping[str, tuple[Callable[[Path], object], str, bool, list[str], str]] = {
    "pickle": (as_pickle, "llama", False, ["q_proj"], "not in a folder here as safetensors"),
    "names": (without_prefix, "llama", False, ["q_proj"], "not in the base's files under this name"),
    "class": (without_class, "llama", False, ["q_proj"], "the base's files are of no class"),
    "torn": (torn_ties, "llama", True, ["q_proj"], "and differ in the base's files"),
    "fused": (lambda base: None, "mixtral", False, ["w1"], "not in the base's files under this name"),
}


@pytest.mark.parametrize("name", NEEDED)
def test_where_files_are_not_the_models_tensors_the_model_is_built(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, kind, tied, targets, says = NEEDED[name]
    base = save_model(tmp_path / "base", kind, torch.float32, tied)
    if kind == "mixtral":  # adapted by the names that its experts had
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        method = next(m for m in METHODS_OF_ALL if m.is_rankable and any(t.stacks_experts for t in m.map_tuners))
        with quiet():
            options = {"target_modules": [], "target_parameters": ["gate_up_proj"], "task_type": "CAUSAL_LM"}
            moved(get_peft_model(model, method.config(r=2, **options))).save_pretrained(str(tmp_path / "adapter"))
    else:
        save_adapter(base, tmp_path / "adapter", target_modules=targets)
    change(base)
    code, told, err = run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--any-base")
    assert code == 0, told + err
    assert "The model is built: " in err and says in err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.model_type == kind


def test_layers_beside_fused_experts_are_patched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model(tmp_path / "base", "mixtral", torch.bfloat16, tied=False)
    assert any("experts.0" in name for name in stored(base))
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    by_files, _ = compared(capsys, monkeypatch, adapter, tmp_path)
    assert stored(by_files).keys() == stored(base).keys()


def test_a_quantised_base_is_not_patched(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", torch.float32, tied=False)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(patchable.NeedsModel, match="quantised"):
        patchable.job_for(adapter, BaseRef(path=str(base)))


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: Any) -> list[str]:
    """Codes of what the command says; there is nothing of the merge afterwards."""
    code, told, _ = run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--json", "-q", *words)
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".peftc-save-*"))
    return [one["code"] for one in json.loads(told)["diagnostics"]] if code else []


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base = save_model(tmp_path / "base", "llama", torch.float32, tied=False)
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    return tmp_path


def test_another_base_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: tensor + 1 for name, tensor in stored(place / "base").items()}
    save_file(tensors, place / "base" / "model.safetensors", {"format": "pt"})
    assert refused(capsys, place) == [rules.OTHER_BASE.code]
    assert merged(capsys, place / "adapter", place / "made", "--any-base")["built"] is False
    put_defect(monkeypatch, identity, "others += [] if _same(sample, tensor) else [name]", "others += []")
    assert merged(capsys, place / "adapter", place / "defect")["built"] is False


def test_no_room_is_told_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    little = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: little)
    assert refused(capsys, place) == [rules.SAVE_FAILED.code]
    put_defect(monkeypatch, streaming, "if free < job.nbytes + beside:", "if free < 0:")
    assert merged(capsys, place / "adapter", place / "defect")["built"] is False


@pytest.mark.parametrize("where", ["put", "copy"])
def test_a_full_disk_leaves_nothing(
    where: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "put":
        monkeypatch.setattr(patched.Patching, "put", full)
    else:
        monkeypatch.setattr(patched, "_blocks", full)
    assert refused(capsys, place) == [rules.SAVE_FAILED.code]


def test_an_index_that_lies_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_model(tmp_path / "base", "llama", torch.float32, tied=False, size="20KB")
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    index = base / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    for wrong in (
        {"weight_map": []},
        {"weight_map": {**said["weight_map"], "ghost": next(iter(said["weight_map"].values()))}},
    ):
        index.write_text(json.dumps(wrong))
        assert refused(capsys, tmp_path) == [rules.CHECKPOINT_DAMAGED.code]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(said["weight_map"], "../adapter/x.safetensors")}))
    assert refused(capsys, tmp_path) == [rules.CHECKPOINT_DAMAGED.code]


def test_other_ways_to_copy_give_the_same_bytes(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(capsys, place / "adapter", place / "one")

    def none(*args: Any) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", none)
    monkeypatch.setattr(patched, "_BLOCK", 1000)
    merged(capsys, place / "adapter", place / "other")
    files = [sorted((file.name, file.read_bytes()) for file in (place / name).iterdir()) for name in ("one", "other")]
    assert files[0] == files[1]


def test_progress_off_a_terminal_tells_bytes_and_time(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "merge", place / "adapter", "-o", place / "merged")
    assert code == 0 and out.startswith("Merged into ")
    assert re.search(r"^Merging, [\d.]+ kB in all …$", err, re.MULTILINE)
    assert re.search(r"^  [\d.]+ kB of [\d.]+ kB, [\d.]+ s left$", err, re.MULTILINE)


def test_a_graph_that_is_not_kept_is_built_by_a_process_of_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTC_CACHE", str(place / "cache"))
    monkeypatch.setitem(sys.modules, "transformers", None)  # as in a process that has not loaded it
    monkeypatch.delitem(sys.modules, "transformers")
    job = patchable.job_for(place / "adapter", BaseRef(path=str(place / "base")))
    assert job.graph.model.cls == "LlamaForCausalLM" and len(list(place.glob("cache/graphs/*.json"))) == 1
    assert "transformers" not in sys.modules


def test_a_merge_by_files_needs_no_transformers(place: Path) -> None:
    """What the command takes of memory is torch, and a few tensors."""
    code = (
        "import sys; from peftc.cli.main import main; main(sys.argv[1:]); "
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )
    words = ["merge", str(place / "adapter"), "-o", str(place / "merged"), "-q"]
    method = next(m for m in METHODS_OF_ALL if m.is_rankable)
    model: Any = AutoModelForCausalLM.from_pretrained(place / "base")
    with quiet():
        options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        moved(get_peft_model(model, method.least(**options))).save_pretrained(str(place / "adapter"))
    graph_of(BaseRef(path=str(place / "base"), task_type="CAUSAL_LM"))
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("layer_replication", [[0, 2], [0, 1]], "replicates layers"),
        ("trainable_token_indices", [1, 2], "trains rows"),
        ("init_lora_weights", "pissa", "start changed the base"),
    ],
)
def test_what_an_adapter_does_to_more_than_weights_of_layers_needs_the_model(
    option: str, value: Any, says: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", "llama", torch.float32, tied=False)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    method = next(m for m in METHODS_OF_ALL if option in m.config.model_fields and m.is_rankable)
    config = method.least(target_modules=["q_proj"], task_type="CAUSAL_LM", **{option: value})
    with quiet():
        moved(get_peft_model(model, config)).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(patchable.NeedsModel, match=says):
        patchable.job_for(tmp_path / "adapter", BaseRef(path=str(base), task_type="CAUSAL_LM"))
