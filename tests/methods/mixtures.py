"""Tiny mixture-of-experts models of each family that stores experts in its own way: built from configs, without files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from peftc.testing.models import seeded

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_ROUTED = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
_SHARED = {"n_routed_experts": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


def _built(cls: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with seeded(0):
            model: nn.Module = getattr(hf, cls)(getattr(hf, config)(**{**_SIZES, **options}))
        with torch.no_grad(), seeded(1):  # some start at zero, or are left as memory came
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        return model.eval()

    return build


MIXTURES: Mapping[str, Callable[[], nn.Module]] = {
    "mixtral": _built("MixtralForCausalLM", "MixtralConfig", num_local_experts=3),
    "qwen2_moe": _built(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", num_experts=3, shared_expert_intermediate_size=8, **_ROUTED
    ),
    "qwen3_moe": _built("Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=3, head_dim=8, **_ROUTED),
    "deepseek_v2": _built("DeepseekV2ForCausalLM", "DeepseekV2Config", **_SHARED, **_LATENT, **_ROUTED),
    "deepseek_v3": _built("DeepseekV3ForCausalLM", "DeepseekV3Config", **_SHARED, **_LATENT, **_ROUTED),
    "olmoe": _built("OlmoeForCausalLM", "OlmoeConfig", num_experts=3, num_experts_per_tok=2),
    "glm4_moe": _built("Glm4MoeForCausalLM", "Glm4MoeConfig", head_dim=8, **_SHARED, **_ROUTED),
    "phimoe": _built("PhimoeForCausalLM", "PhimoeConfig", num_local_experts=3),
    "gpt_oss": _built("GptOssForCausalLM", "GptOssConfig", num_local_experts=3, num_experts_per_tok=2, head_dim=8),
    "llama4": _built(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        num_local_experts=3,
        intermediate_size_mlp=24,
        head_dim=8,
        interleave_moe_layer_step=2,
    ),
    "minimax": _built(
        "MiniMaxForCausalLM", "MiniMaxConfig", num_local_experts=3, layer_types=["full_attention", "full_attention"]
    ),
}


def logits(model: nn.Module) -> Tensor:
    """What the model says of a fixed text."""
    with torch.no_grad():
        output: Tensor = model(input_ids=torch.arange(1, 11).reshape(2, 5)).logits
    return output
