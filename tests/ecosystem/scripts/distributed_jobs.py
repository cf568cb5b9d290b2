"""Adapters trained by two processes, in each way that torch and DeepSpeed split a model. One of the two; they find each other.

Arguments: the file by which they meet, the rank, and the rows to run, or none for all. A row is a way and an adapter.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
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
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, StateDictType, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer import update_fsdp_plugin_peft

MEETING, RANK, ASKED = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
STEPS = 3
OURS = PeftModel.__module__.startswith("peftc")
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
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
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


def saved(model: PeftModel, row: str, state: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Saves, which writes in one process, and says what the adapter gives when it is loaded onto a whole base."""
    folder = Path.cwd() / row
    model.save_pretrained(folder, state_dict=state, is_main_process=RANK == 0)
    dist.barrier()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = PeftModel.from_pretrained(base(), folder).eval()(**batch(9)).loss
    return {"loss": float(loss), "warned": [str(w.message) for w in caught if "Peft" in w.category.__name__]}


def sums(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: tensor.double().abs().sum().item() for name, tensor in tensors.items()}


# the ways -------------------------------------------------------------------------------------------------------------


def ddp(adapter: str, row: str) -> dict[str, Any]:
    model = adapted(adapter)
    wrapped = DistributedDataParallel(model)
    return {"losses": trained(wrapped, trainable(model)), "reloaded": saved(model, row)}


def in_fsdp1(model: PeftModel, original: bool) -> FSDP:
    """With the policy that transformers sets for adapted models. On a CPU accelerate takes DDP instead, so it is asked here."""
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = BLOCKS
    plugin = SimpleNamespace()
    update_fsdp_plugin_peft(model, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    cpu = torch.device("cpu")
    return FSDP(model, auto_wrap_policy=plugin.auto_wrap_policy, device_id=cpu, use_orig_params=original)


def fsdp1(adapter: str, row: str, original: bool) -> dict[str, Any]:
    model = adapted(adapter)
    wrapped = in_fsdp1(model, original)
    losses = trained(wrapped, trainable(wrapped))
    with FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)):
        state = wrapped.state_dict()
        asked = get_peft_model_state_dict(wrapped) if OURS else {}
        if OURS:  # what was trained, through a model that was given other values
            given = {name: tensor.clone() for name, tensor in asked.items()}
            set_peft_model_state_dict(wrapped, {name: torch.zeros_like(tensor) for name, tensor in given.items()})
            set_peft_model_state_dict(wrapped, given)
            state = wrapped.state_dict()
    found = get_peft_model_state_dict(model, state_dict=state)
    return {"losses": losses, "found": sums(found), "asked": sums(asked), "reloaded": saved(model, row, state)}


def in_fsdp2(model: PeftModel, leaves: bool) -> PeftModel:
    for module in list(model.modules()) if leaves else []:
        own = list(module.parameters(recurse=False))
        if own and not list(module.children()) and all(parameter.requires_grad for parameter in own):
            fully_shard(module)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def fsdp2(adapter: str, row: str, leaves: bool) -> dict[str, Any]:
    model = in_fsdp2(adapted(adapter), leaves)
    losses = trained(model, trainable(model))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"losses": losses, "reloaded": saved(model, row, state)}


ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_allow_untested_optimizer": True,
}


def in_zero3(model: PeftModel) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, config=ZERO3, model_parameters=trainable(model))[0]


def zero3(adapter: str, row: str) -> dict[str, Any]:
    """Sharded while it is loaded, as `Trainer` has it."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # a kernel that DeepSpeed would compile first; gloo does the same
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    folder = MEETING.parent / "base"
    if RANK == 0 and not folder.exists():
        base().save_pretrained(folder)
    dist.barrier()
    config = HfDeepSpeedConfig(ZERO3)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), ADAPTERS[adapter]())
    del config
    with deepspeed.zero.GatheredParameters(trainable(model), modifier_rank=0):
        if RANK == 0:
            fill(model)
    engine = in_zero3(model)
    losses = []
    for step in range(STEPS):
        loss = engine(**batch(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {"losses": losses, "reloaded": saved(model, row, engine._zero3_consolidated_16bit_state_dict())}


WAYS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "ddp": ddp,
    "fsdp1": partial(fsdp1, original=True),
    "fsdp1-flat": partial(fsdp1, original=False),
    "fsdp2": partial(fsdp2, leaves=False),
    "fsdp2-leaves": partial(fsdp2, leaves=True),
    "zero3": zero3,
}
#: FSDP1 without the original parameters takes no trainable ones beside frozen ones
FLAT = ("lora", "head")


# outside of calls -----------------------------------------------------------------------------------------------------


HELD: dict[str, Callable[[PeftModel], Any]] = {
    "fsdp1": partial(in_fsdp1, original=True),
    "fsdp1-flat": partial(in_fsdp1, original=False),
    "fsdp2": partial(in_fsdp2, leaves=False),
    "zero3": in_zero3,
}
OPERATIONS: dict[str, Callable[[PeftModel, Path], object]] = {
    "merge": lambda m, at: m.merge_adapter(),
    "merge_layer": lambda m, at: m.base_model.model.get_submodule(LAYER).merge(),
    "merge_and_unload": lambda m, at: m.merge_and_unload(),
    "combine": lambda m, at: m.add_weighted_adapter(["default"], [1.0], "combined"),
    "convert": lambda m, at: convert_to_lora(m, 2),
    "save": lambda m, at: m.save_pretrained(at, is_main_process=RANK == 0),
    "read": lambda m, at: get_peft_model_state_dict(m),
    "write": lambda m, at: set_peft_model_state_dict(m, START),
    "add": lambda m, at: m.add_adapter("another", ADAPTERS["lora"]()),
    "unload": lambda m, at: m.unload(),
}
LAYER = "model.layers.0.self_attn.q_proj"
START: dict[str, Tensor] = {}


def outside(way: str) -> dict[str, Any]:
    """What is asked of a model that is held in shards: the codes of what is said, and whether it computes as before."""
    model = adapted("lora")
    START.update({name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()})
    wrapped = HELD[way](model)
    results: dict[str, Any] = {}
    with torch.no_grad():
        before = float(wrapped(**batch(0)).loss)
        for name, operation in OPERATIONS.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    operation(model, MEETING.parent / f"{way}-outside")
                    said = [w.message.diagnostic.code for w in caught if hasattr(w.message, "diagnostic")]
                except Exception as error:
                    said = [found.code for found in getattr(error, "diagnostics", ())] or [repr(error)]
            after = None if name == "unload" else float(wrapped(**batch(0)).loss)
            results[name] = {"said": sorted(set(said)), "same": after in (None, before)}
            dist.barrier()
    return results


def rows() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for way, run in WAYS.items():
        for adapter in ADAPTERS if way != "fsdp1-flat" else FLAT:
            yield f"{way}-{adapter}", partial(run, adapter, f"{way}-{adapter}")
    for way in HELD if OURS else ():
        yield f"outside-{way}", partial(outside, way)


def asked() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The rows that were asked for, and can be: DeepSpeed is not everywhere."""
    for row, run in rows():
        if (not ASKED or row in ASKED) and ("zero3" not in row or find_spec("deepspeed") is not None):
            yield row, run


def main() -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{MEETING}",
        rank=RANK,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for row, run in asked():
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
