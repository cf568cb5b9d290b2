"""Adapters trained by two processes, in each way that torch and DeepSpeed split a model. One of the two; they find each other.

Arguments: the folder in which they meet, the rank, and the rows to run, or none for all. A row is a way and an adapter.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import drawn, fill, write
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, StateDictType, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

MEETING, RANK, ASKED = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
STEPS = 3
BLOCKS = "LlamaDecoderLayer"
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}

ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **COMMON),
    "head": lambda: LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], **COMMON),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **COMMON
    ),
    "vera": lambda: VeraConfig(r=8, target_modules=["q_proj", "o_proj"], **COMMON),
}


def base() -> LlamaForCausalLM:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(drawn(name, parameter.shape, 0.15))
    return model


def adapted(adapter: str) -> PeftModel:
    model = get_peft_model(base(), ADAPTERS[adapter]())
    fill(model)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch(step: int) -> dict[str, Tensor]:
    """Another one in each process and step."""
    ids = (torch.arange(24).reshape(2, 12) * 7 + 11 * RANK + 5 * step) % 64
    return {"input_ids": ids, "labels": ids}


def trained(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    """The losses of a few steps."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved(model: PeftModel, row: str, state: dict[str, Tensor] | None = None) -> float:
    """Saves, which writes in one process, and says what the adapter gives when it is loaded onto a whole base."""
    folder = Path.cwd() / row
    model.save_pretrained(folder, state_dict=state, is_main_process=RANK == 0)
    dist.barrier()
    with torch.no_grad():
        return float(PeftModel.from_pretrained(base(), folder).eval()(**batch(9)).loss)


# the ways -------------------------------------------------------------------------------------------------------------


def ddp(adapter: str, row: str) -> dict[str, Any]:
    model = adapted(adapter)
    wrapped = DistributedDataParallel(model)
    return {"losses": trained(wrapped, trainable(model)), "reloaded": saved(model, row)}


def fsdp1(adapter: str, row: str, original: bool) -> dict[str, Any]:
    """With the policy that transformers sets for adapted models."""
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = BLOCKS
    model = adapted(adapter)
    policy, cpu = fsdp_auto_wrap_policy(model), torch.device("cpu")
    wrapped = FSDP(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=original)
    losses = trained(wrapped, trainable(wrapped))
    with FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)):
        state = wrapped.state_dict()
    found = get_peft_model_state_dict(model, state_dict=state)
    return {
        "losses": losses,
        "tensors": {name: tensor.double().abs().sum().item() for name, tensor in found.items()},
        "reloaded": saved(model, row, state),
    }


def fsdp2(adapter: str, row: str, leaves: bool) -> dict[str, Any]:
    model = adapted(adapter)
    if leaves:
        for module in list(model.modules()):
            own = list(module.parameters(recurse=False))
            if own and not list(module.children()) and all(parameter.requires_grad for parameter in own):
                fully_shard(module)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    losses = trained(model, trainable(model))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"losses": losses, "reloaded": saved(model, row, state)}


def zero3(adapter: str, row: str) -> dict[str, Any]:
    """Sharded while it is loaded, as `Trainer` has it."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    # a kernel that DeepSpeed would compile first; gloo does the same
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    folder = Path.cwd() / "base"
    if RANK == 0 and not folder.exists():
        base().save_pretrained(folder)
    dist.barrier()
    keep = HfDeepSpeedConfig(config)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), ADAPTERS[adapter]())
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    with deepspeed.zero.GatheredParameters(trainable(model), modifier_rank=0):
        if RANK == 0:
            fill(model)
    engine = deepspeed.initialize(model=model, config=config, model_parameters=trainable(model))[0]
    losses = []
    for step in range(STEPS):
        loss = engine(**batch(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    state = engine._zero3_consolidated_16bit_state_dict()
    del keep
    return {"losses": losses, "shapes": shapes, "reloaded": saved(model, row, state)}


WAYS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "ddp": ddp,
    "fsdp1-flat": partial(fsdp1, original=False),
    "fsdp1": partial(fsdp1, original=True),
    "fsdp2": partial(fsdp2, leaves=False),
    "fsdp2-leaves": partial(fsdp2, leaves=True),
    "zero3": zero3,
}


def rows() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for way, run in WAYS.items():
        for adapter in ADAPTERS:
            row = f"{way}-{adapter}"
            if not ASKED or row in ASKED:
                yield row, partial(run, adapter, row)


def main() -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{MEETING}/store",
        rank=RANK,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for row, run in rows():
        start = time.process_time()
        try:
            results[row] = run()
        except Exception:
            results[row] = {"error": traceback.format_exc()}
        results[row]["time"] = time.process_time() - start
        write(results, f"results-{RANK}.json")
        dist.barrier()
    dist.destroy_process_group()


main()
