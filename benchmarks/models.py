"""Models that rows measure on; both sides build them alike.

The large ones are configs of `examples/configs`, the small ones have random weights. Torch is imported when one is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import library

if TYPE_CHECKING:
    from torch import nn

#: File in `examples/configs` -> what the model is called.
LARGE = {"llama-3.1-405b": "Llama-3.1-405B", "deepseek-v3": "DeepSeek-V3"}

#: The linear layers of a Llama block: attention, then MLP.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = (*ATTENTION, *MLP)


def config_file(model: str) -> Path:
    """The config of a large model."""
    return Path(__file__).resolve().parent.parent / "examples" / "configs" / f"{model}.json"


def on_meta(model: str) -> nn.Module:
    """A large model on the meta device: shapes without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(config_file(model).read_text(encoding="utf-8")))
    with torch.device("meta"):
        built: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return built


def tree(blocks: int, width: int = 16) -> nn.Module:
    """Blocks of seven small linear layers, named and nested as in a Llama model."""
    from torch import nn

    def group(names: Sequence[str]) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})

    layers = (nn.ModuleDict({"self_attn": group(ATTENTION), "mlp": group(MLP)}) for _ in range(blocks))
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})})


def llama(**sizes: int) -> nn.Module:
    """A Llama with random weights in float32; hidden size 512, 8 layers, 8 heads unless told otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **sizes}))


def lora(lib: Any, **options: Any) -> Any:
    """The adapter that most rows use: rank 8 on all seven linear layers of a block."""
    return lib.LoraConfig(**{"r": 8, "target_modules": list(LINEARS), **options})


def frozen_llama() -> Any:
    """`llama` for training: every parameter frozen, but gradients run through from the embeddings' output."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = llama()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model.train()


def with_lora(name: str, model: Any, **options: Any) -> Any:
    """The model with the adapter of the library `name`, no longer at its start."""
    lib = library(name)
    return lib.get_peft_model(model, lora(lib, init_lora_weights=False, **options)).train()


def training_step(model: Any) -> Callable[[], None]:
    """A step on 4 × 256 random tokens: forward, loss, backward, gradients dropped."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (4, 256))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def live_peak(step: Callable[[], None]) -> float:
    """Most bytes that torch's CPU allocator has handed out at once during a step, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return float(peak)
