"""Adapters on a base whose weights transformers splits between two processes. One of the two; they find each other.

Arguments: the file by which they meet, the rank, and the rows to run, or none for all. What a row compares with is the same
adapter on the whole base, in the same process.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from common import drawn, write
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

MEETING, RANK, ASKED = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
STEPS = 3
OURS = PeftModel.__module__.startswith("peftc")
BASE = MEETING.parent / "base"
COLUMNS, ROWS = ["q_proj", "v_proj", "gate_proj"], ["o_proj", "down_proj"]


def config(name: str, **options: Any) -> Callable[[], PeftConfig]:
    return partial(getattr(peft, name), task_type="CAUSAL_LM", **options)


LINEAR: dict[str, Any] = {"target_modules": "all-linear"}
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "columns": config("LoraConfig", r=4, lora_alpha=8, target_modules=COLUMNS),
    "rows": config("LoraConfig", r=4, lora_alpha=8, target_modules=ROWS),
    "all": config("LoraConfig", r=4, target_modules=[*COLUMNS, *ROWS, "k_proj", "embed_tokens", "lm_head"]),
    "drops": config("LoraConfig", r=4, lora_dropout=0.3, **LINEAR),
    "dora": config("LoraConfig", r=4, use_dora=True, **LINEAR),
    "ia3": config("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": config("VeraConfig", r=8, **LINEAR),
    "hra": config("HRAConfig", r=2, **LINEAR),
    "oft": config("OFTConfig", r=0, oft_block_size=4, target_modules=[*COLUMNS, "o_proj"]),
    "boft": config("BOFTConfig", boft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "loha": config("LoHaConfig", r=4, target_modules=[*COLUMNS, *ROWS]),
    "lokr": config("LoKrConfig", r=4, target_modules=[*COLUMNS, *ROWS]),
    "fourier": config("FourierFTConfig", n_frequency=20, **LINEAR),
    "adalora": config("AdaLoraConfig", init_r=4, target_r=2, total_step=100, **LINEAR),
    "hira": config("HiraConfig", r=4, **LINEAR),
    "norms": config("LNTuningConfig", target_modules=["input_layernorm"]),
    "tokens": config("TrainableTokensConfig", token_indices=[1, 2, 40], target_modules=["embed_tokens"]),
    "prompt": config("PromptTuningConfig", num_virtual_tokens=3),
    "sampled": config("PromptTuningConfig", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"),
}
if not OURS:  # what is shown of the reference is on which layers it works
    ADAPTERS = {name: ADAPTERS[name] for name in ("columns", "rows", "ia3", "dora")}

REFUSED: dict[str, Callable[[], PeftConfig]] = {
    "head": config("LoraConfig", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prefix": config("PrefixTuningConfig", num_virtual_tokens=3),
    "around": config("AdaptionPromptConfig", adapter_len=4, adapter_layers=1),
    "biases": config("LoraConfig", r=2, target_modules=["q_proj"], bias="all"),
    "start": config("LoraConfig", r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
}


def make_base() -> None:
    """With biases, and with sizes of which one process has more than the other."""
    sizes = {"vocab_size": 65, "hidden_size": 32, "intermediate_size": 51, "num_hidden_layers": 2}
    biases = {"attention_bias": True, "mlp_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **biases, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(drawn(name, parameter.shape, 0.15))
    model.save_pretrained(BASE)


def base(split: bool) -> LlamaForCausalLM:
    plan = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)} if split else {}
    return LlamaForCausalLM.from_pretrained(BASE, **plan)


def batch(step: int) -> dict[str, Tensor]:
    """The same one in both processes, another in each step."""
    ids = (torch.arange(24).reshape(2, 12) * 7 + 5 * step) % 64
    return {"input_ids": ids, "labels": ids}


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moved(model: nn.Module) -> None:
    """Adds the same numbers to what each process, and the whole model, began with, so that something is at work. The reference
    draws other starts for a split model: there they are exchanged."""
    with torch.no_grad():
        for name, parameter in trained_of(model).items():
            added = drawn(name, parameter.shape).to(parameter.dtype)
            if isinstance(parameter, DTensor):  # the reference's
                added = distribute_tensor(added, parameter.device_mesh, parameter.placements)
            parameter.mul_(OURS).add_(added)


def sums(tensors: dict[str, Tensor]) -> dict[str, float]:
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.detach().double().abs().sum().item() for name, tensor in whole.items()}


def trained(model: nn.Module) -> dict[str, Any]:
    """Loss without gradients, then those of a few steps, and the gradients of the first."""
    with torch.no_grad():
        losses = [model.eval()(**batch(9)).loss.item()]
    model.train()
    torch.manual_seed(5)  # what drops
    parameters = trained_of(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    gradients: dict[str, float] = {}
    for step in range(STEPS):
        loss = model(**batch(step)).loss
        loss.backward()
        gradients = gradients or sums({name: p.grad for name, p in parameters.items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients}


def run(adapter: str) -> dict[str, Any]:
    """The adapter on the split base and on the whole one: starts, losses, gradients, and files."""
    results: dict[str, Any] = {}
    for kind in ("whole", "split"):
        torch.manual_seed(7 + RANK if OURS and kind == "split" else 7)  # each process draws another start
        model = get_peft_model(base(kind == "split"), ADAPTERS[adapter]())
        begun = sums(trained_of(model))
        moved(model)
        results[kind] = {"begun": begun, **trained(model)}
        folder = Path.cwd() / f"{adapter}-{kind}"
        model.save_pretrained(folder, is_main_process=RANK == 0)
        dist.barrier()
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = PeftModel.from_pretrained(base(kind == "split"), folder).eval()
            results[kind]["warned"] = [str(w.message) for w in caught if "Peft" in w.category.__name__]
            results[kind]["reloaded"] = again(**batch(9)).loss.item()
            results[kind]["now"] = model.eval()(**batch(9)).loss.item()
            with model.disable_adapter():
                results[kind]["disabled"] = model(**batch(9)).loss.item()
            results[kind]["generated"] = model.generate(
                batch(1)["input_ids"], max_new_tokens=4, do_sample=False
            ).tolist()
    results["merge"] = said(lambda: model.merge_adapter())
    results["after"] = model(**batch(9)).loss.item()
    return results


def share() -> dict[str, Any]:
    """Bytes of the base here, and what a plan says of them."""
    from peftc import compile_plan
    from peftc.compiler.plan.mesh import Mesh, share_of
    from peftc.runtime.applying.snapshot import snapshot

    plans = [compile_plan(snapshot(base(split)), {"default": ADAPTERS["rows"]()}) for split in (False, True)]
    held = sum(getattr(p, "_local_tensor", p).nbytes for p in base(True).parameters())
    return {"held": held, "planned": [share_of(plan, Mesh(tp=2)).cost.base for plan in plans]}


def said(operation: Callable[[], object]) -> list[str]:
    """The codes of what an operation is refused with, with what it names."""
    try:
        operation()
    except Exception as error:
        return [f"{found.code} {found.what}" for found in getattr(error, "diagnostics", ())] or [repr(error)]
    return []


def refused(name: str) -> dict[str, Any]:
    """What is said, and whether the base computes as before."""
    model = base(True)
    with torch.no_grad():
        before = model(**batch(0)).loss.item()
        found = said(lambda: get_peft_model(model, REFUSED[name]()))
        return {"said": found, "same": model(**batch(0)).loss.item() == before}


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{MEETING}", rank=RANK, world_size=2, timeout=timedelta(seconds=20)
    )
    if RANK == 0:
        make_base()
    dist.barrier()
    jobs = {name: partial(run, name) for name in ADAPTERS}
    if OURS:
        jobs |= {"share": share, **{f"refused-{name}": partial(refused, name) for name in REFUSED}}
    results: dict[str, Any] = {}
    for row, job in jobs.items():
        if ASKED and row not in ASKED:
            continue
        start = time.process_time()
        try:
            results[row] = job()
        except Exception:
            results[row] = {"error": traceback.format_exc()}
        results[row]["time"] = time.process_time() - start
        write(results, f"results-{RANK}.json")
        dist.barrier()
    dist.destroy_process_group()


main()
