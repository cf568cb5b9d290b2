"""Merging an adapter into a checkpoint of 2 GB: the command, the reference's load, merge and save, and a plain copy."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import whole_process
from benchmarks.models import LINEARS
from benchmarks.row import BOTH, OURS, PEER, Row, run
from benchmarks.table import Check, Reading, Readings, Target, Unit

#: A Llama of 1.01 thousand million parameters, 2.02 GB in bfloat16.
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
#: Bytes of a shard.
SHARD = 500_000_000
#: Layers that an adapter is on: all of a block, or those that the reference adapts by default.
ADAPTERS = {"all": list(LINEARS), "few": ["q_proj", "v_proj"]}
COPY, WRITE = "cp", "write"
#: What the reference's users run.
SCRIPT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""

ROW = Row(
    title="Merging files",
    how="A checkpoint of 2.02 GB in five shards (Llama of 20 layers, hidden size 2048, bfloat16, seeded) and LoRA adapters of rank "
    "8, one on all seven linear layers of a block, one on q and v. Whole processes: `peftc merge ADAPTER --base FOLDER --out FOLDER` with "
    "the base's graph in the cache, and once before without (the graph is then built by a process of its own); the reference's "
    "`from_pretrained`, `merge_and_unload`, `save_pretrained`; `cp -r`, alone and with `sync` of the copy: the latter is the like "
    "measure, as the command does not end before its result is on the disk. The checkpoint was just written, so that reading it "
    "needs no disk. Python may keep bytecode, as an installed package has it. Ratios are of wall time, which moves with the disk and "
    "with what else runs, but for the one of CPU time.",
    sides={**BOTH, COPY: (COPY,)},
    checks=(
        Check("merge, 2 GB: peak memory", Reading(OURS, "all_peak"), target=Target(400e6), unit=Unit.BYTES),
        Check(
            "merge, 2 GB: peak memory, graph not cached",
            Reading(OURS, "first_peak"),
            target=Target(400e6),
            unit=Unit.BYTES,
        ),
        Check("merge, 2 GB: the reference's peak memory", Reading(PEER, "all_peak"), unit=Unit.BYTES),
        Check("merge, all linear layers", Reading(OURS, "all"), Reading(PEER, "all"), Target(1), wall=True),
        Check("merge, q and v", Reading(OURS, "few"), Reading(PEER, "few"), Target(1), wall=True),
        Check("merge, all linear layers: CPU time", Reading(OURS, "all"), Reading(PEER, "all"), Target(1)),
        Check("merge, all, graph not cached", Reading(OURS, "first"), Reading(PEER, "all"), Target(1), wall=True),
        Check(
            "merge, all, against `cp -r` and `sync`",
            Reading(OURS, "all"),
            Reading(COPY, "synced"),
            Target(2),
            wall=True,
        ),
        Check(
            "merge, q and v, against `cp -r` and `sync`",
            Reading(OURS, "few"),
            Reading(COPY, "synced"),
            Target(2),
            wall=True,
        ),
        Check("merge, all, against `cp -r`", Reading(OURS, "all"), Reading(COPY, "copied"), Target(2), wall=True),
        Check("merge, q and v, against `cp -r`", Reading(OURS, "few"), Reading(COPY, "copied"), Target(2), wall=True),
    ),
    rounds=3,
)


def measure(side: str, goal: str = "") -> Readings:
    """Seconds and peak memory of one side; each merge goes into a new folder, which is removed before the next.

    The files are written by a process of their own (`write`, into `goal`): a process begins with the peak of the one that
    starts it, which has to stay small.
    """
    if side == WRITE:
        base = write_base(Path(goal, "base"))
        for metric, targets in ADAPTERS.items():
            write_adapter(base, Path(goal, metric), targets)
        return {}
    with tempfile.TemporaryDirectory() as place:
        whole_process([sys.executable, "-m", __spec__.name, WRITE, place], WRITE)
        base, out, readings = Path(place, "base"), str(Path(place, "out")), {}
        if side == COPY:
            for metric, command in (("copied", "cp -r {} {}"), ("synced", "cp -r {0} {1} && sync {1}/*")):
                readings |= _clean(out, ["sh", "-c", command.format(base, out)], metric)
            return readings
        for metric in ADAPTERS:
            adapter = Path(place, metric)
            argv = [sys.executable, "-m", "peftc", "merge", str(adapter), "--base", str(base), "--out", out, "-q"]
            if side == PEER:
                argv = [sys.executable, "-c", SCRIPT, str(base), str(adapter), out]
            elif "first_wall" not in readings:
                readings |= _clean(out, argv, "first", place)
            readings |= _clean(out, argv, metric, place)
        return readings


def _clean(out: str, argv: list[str], metric: str, cache: str = "") -> dict[str, float]:
    """A whole process that starts while the disk rests, and finds nothing at its goal."""
    whole_process(["rm", "-rf", out], "cleared")
    os.sync()
    environment = {"PYTHONDONTWRITEBYTECODE": ""}
    return whole_process(argv, metric, environment | ({"PEFTC_CACHE": cache} if cache else {}))


def write_base(folder: Path) -> Path:
    """The checkpoint, as transformers lays it out; no model is built for it."""
    import torch
    from safetensors.torch import save_file

    model, config = _on_meta()
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    homes: dict[str, str] = {}
    shard: dict[str, Any] = {}

    def flush() -> None:
        name = f"model-{len(set(homes.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        homes.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, tensor in model.state_dict().items():
        shard[key] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if sum(made.nbytes for made in shard.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": sum(2 * t.numel() for t in model.state_dict().values())}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(base: Path, folder: Path, targets: list[str]) -> Path:
    """An adapter with factors at random, as the reference saves it."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    tensors = get_peft_model_state_dict(get_peft_model(_on_meta()[0], config))
    generator = torch.Generator().manual_seed(1)
    drawn = {key: 0.02 * torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    config.save_pretrained(str(folder))
    save_file(drawn, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def _on_meta() -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, dtype="bfloat16", architectures=["LlamaForCausalLM"], tie_word_embeddings=False)
    with torch.device("meta"):
        return LlamaForCausalLM(config), config


if __name__ == "__main__":
    run(measure)
