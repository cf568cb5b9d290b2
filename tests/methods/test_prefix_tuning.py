"""Prefix tuning: sizes of keys and values, how they start, and models whose layers differ."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from peftc import PeftcError, PeftcWarning, PeftModel, PrefixTuningConfig, get_peft_model
from peftc.testing.models import MODELS, seeded

LLAMA = next(model for model in MODELS if model.name == "llama")
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def wrapped(base: nn.Module | None = None, **options: object) -> PeftModel:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", **{"num_virtual_tokens": 3, **options})
    return get_peft_model(LLAMA.build() if base is None else base, config).eval()


def built(model_type: str, **options: object) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{**SMALL, **options})
    with seeded(0):
        return AutoModelForCausalLM.from_config(config).eval()


def test_sizes_are_those_of_the_keys() -> None:
    config = wrapped().active_peft_config
    assert (config.token_dim, config.num_attention_heads, config.num_layers) == (8, 2, 2)


def test_sizes_of_another_model_are_corrected_and_told() -> None:
    with pytest.warns(PeftcWarning, match=r"`token_dim` is 16, but the model's is 8"):
        model = wrapped(token_dim=16)
    assert model.active_peft_config.token_dim == 8


@pytest.mark.parametrize("projection", [False, True])
def test_a_start_at_zero(projection: bool) -> None:
    model = wrapped(init_weights="zero", prefix_projection=projection)
    assert not model.prompt_encoder["default"]().count_nonzero()
    assert wrapped(prefix_projection=projection).prompt_encoder["default"]().count_nonzero()


def test_the_table_is_dealt_out_layer_after_layer_keys_first() -> None:
    model = wrapped()
    cache = model.get_prompt(2)
    table = model.prompt_encoder["default"]().view(3, 2, 2, 2, 8 // 2)
    for layer in range(2):
        assert torch.equal(cache.layers[layer].keys[1], table[:, layer, 0].transpose(0, 1))
        assert torch.equal(cache.layers[layer].values[0], table[:, layer, 1].transpose(0, 1))


LAYERED = {
    "mistral": {"num_hidden_layers": 2, "sliding_window": 4},
    "gemma2": {"num_hidden_layers": 2, "sliding_window": 4, "head_dim": 4},
    "gemma3_text": {"num_hidden_layers": 4, "sliding_window": 4, "head_dim": 4},
}


@pytest.mark.parametrize("model_type", LAYERED)
def test_sliding_layers_see_what_their_window_reaches(model_type: str) -> None:
    """With a cache or without, and with one of fixed length, the tokens are the same."""
    model = wrapped(built(model_type, **LAYERED[model_type]))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
    }
    found = model.generate(**call)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert model.generate(**call, **other).tolist() == found.tolist(), other


def test_layers_of_other_shapes_are_told() -> None:
    options = {
        "num_hidden_layers": 2, "head_dim": 4, "global_head_dim": 8, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 40,
    }  # fmt: skip
    base = built("gemma4_text", **options)
    with pytest.warns(PeftcWarning, match="1 layers have keys of other shapes than 1 heads of 8"):
        model = wrapped(base)
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).logits.isfinite().all()


def test_layers_that_share_keys_are_passed_over() -> None:
    options = {
        "num_hidden_layers": 3, "head_dim": 4, "global_head_dim": 4, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 40,
    }  # fmt: skip
    model = wrapped(built("gemma4_text", **options))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    assert not torch.allclose(model(input_ids=ids).logits, base)


def test_compressed_keys_are_refused() -> None:
    sizes = {
        "num_hidden_layers": 1,
        "kv_lora_rank": 4,
        "q_lora_rank": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    }
    base = built("deepseek_v3", **sizes, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PeftcError, match="PC530"):
            wrapped(base)
    assert all(p.requires_grad for p in base.parameters())
