"""Adapters as they were made with transformers 4 for models whose experts are fused now, with what they come to: a base
edited by hand. Names, parts and places of the families are written out here, from their checkpoints on the hub.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = "base_model.model."
EXPERTS, HIDDEN, WIDTH = 4, 32, 16
SIZES = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
W = ("w1", "w3", "w2")
PROJ = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One architecture: `old` and `new` are the block of experts inside a layer, then and now, and `routers` likewise.

    `names` are those of an expert's layers, the last is what `down_proj` is now. `beside` are linear layers that the names
    of the targets mean as well, or that are targeted too.
    """

    name: str
    old: str
    names: tuple[str, str, str]
    options: Mapping[str, Any]
    routers: tuple[str, str] = ("mlp.gate", "mlp.gate")
    beside: tuple[str, ...] = ("self_attn.q_proj",)
    new: str = "mlp"

    def config(self) -> transformers.PretrainedConfig:
        """A tiny model's."""
        made: transformers.PretrainedConfig = getattr(transformers, f"{self.name}Config")(**{**SIZES, **self.options})
        return made

    @cached_property
    def base(self) -> transformers.PreTrainedModel:
        """The model, always the same weights. Copy it before it is adapted."""
        torch.manual_seed(0)
        model: transformers.PreTrainedModel = getattr(transformers, f"{self.name}ForCausalLM")(self.config())
        return model.eval()

    @property
    def targets(self) -> list[str]:
        """What a config of then named."""
        return sorted({*self.names, *(path.rpartition(".")[2] for path in (self.routers[0], *self.beside))})


MIXTRAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
BLOCK = ("block_sparse_moe.gate", "mlp.gate")
QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH, "mlp_only_layers": [0]}
DENSE = tuple(f"mlp.{name}" for name in PROJ)
SHARED = tuple(f"mlp.shared_experts.{name}" for name in PROJ)
FAMILIES = (
    Family("Mixtral", "block_sparse_moe", W, MIXTRAL, BLOCK),
    Family("Phimoe", "block_sparse_moe", W, MIXTRAL, ("block_sparse_moe.gate", "mlp.router")),
    Family("MiniMax", "block_sparse_moe", W, {**MIXTRAL, "head_dim": 8}, BLOCK),
    Family("Olmoe", "mlp", PROJ, {"num_experts": EXPERTS, "num_experts_per_tok": 2}),
    Family("Qwen3Moe", "mlp", PROJ, {**QWEN, "head_dim": 8}, beside=("self_attn.q_proj", *DENSE)),
    Family(
        "Qwen2Moe",
        "mlp",
        PROJ,
        {**QWEN, "shared_expert_intermediate_size": 24},
        beside=("self_attn.q_proj", *DENSE, *(f"mlp.shared_expert.{name}" for name in PROJ)),
    ),
    Family("DeepseekV2", "mlp", PROJ, {**DEEPSEEK, **LATENT}, beside=("self_attn.q_b_proj", *DENSE, *SHARED)),
    Family("DeepseekV3", "mlp", PROJ, {**DEEPSEEK, **LATENT}, beside=("self_attn.q_b_proj", *DENSE, *SHARED)),
    Family("Glm4Moe", "mlp", PROJ, {**DEEPSEEK, "head_dim": 8}, beside=("self_attn.q_proj", *DENSE, *SHARED)),
)
BY_NAME = {family.name: family for family in FAMILIES}


@dataclass(frozen=True)
class Old:
    """An adapter of then: tensors by key, config, and the base edited by hand."""

    family: Family
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    edited: nn.Module

    def save(self, folder: Path) -> Path:
        """Write it as a release of then did."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return folder


def old_adapter(
    family: Family,
    rank: Callable[[str], int] = lambda path: 2,
    alpha: Callable[[str], float] = lambda path: 4,
    left_out: Callable[[str], bool] = lambda path: False,
    seed: int = 1,
    **options: Any,
) -> Old:
    """An adapter on everything that the family's names mean; ranks and numerators by the layer's former path."""
    edited = copy.deepcopy(family.base)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    rooted = options.get("use_rslora", False)
    for path, weight in former_weights(family, edited):
        r = rank(path)
        A, B = (torch.randn(shape, generator=generator) * 0.2 for shape in ((r, weight.shape[1]), (weight.shape[0], r)))
        if left_out(path):
            continue
        tensors |= {f"{ROOT}{path}.lora_A.weight": A, f"{ROOT}{path}.lora_B.weight": B}
        with torch.no_grad():
            weight += alpha(path) / (r**0.5 if rooted else r) * B @ A
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "inference_mode": True}
    return Old(family, tensors, {**config, "target_modules": family.targets, **options}, edited)


def former_weights(family: Family, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Former path and weight (out, in) of every layer, as a part of what the model has."""
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        at = f"model.layers.{number}."
        modules, weights = dict(layer.named_modules()), dict(layer.named_parameters())
        for path in family.beside:
            if path in modules:
                yield at + path, modules[path].weight.data
        if f"{family.new}.experts.down_proj" not in weights:
            continue  # a dense layer
        gate_up, down = (weights[f"{family.new}.experts.{name}"].data for name in ("gate_up_proj", "down_proj"))
        yield at + family.routers[0], weights[f"{family.routers[1]}.weight"].data
        for expert in range(EXPERTS):
            for name, weight in zip(family.names, (*gate_up[expert].chunk(2), down[expert]), strict=True):
                yield f"{at}{family.old}.experts.{expert}.{name}", weight


def logits(model: nn.Module) -> Tensor:
    """What a model says of a few tokens."""
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(3, 15)[None]).logits
    return found
