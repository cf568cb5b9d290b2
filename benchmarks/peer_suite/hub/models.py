"""Stand-ins for the language models and encoders that the tests load: transformers' own classes, small and random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peer_suite.hub import tokenizers
from benchmarks.peer_suite.hub.repos import MAIN, repo

#: Rows of embeddings; tokenizers have fewer entries.
VOCABULARY = 1024
#: Who owns the repositories that the tests load.
PEFT, TRL, HF = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"

#: A decoder of today.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
ROBERTA: dict[str, Any] = {
    **BERT,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "type_vocab_size": 1,
}
WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_mel_bins": 80,
    "max_source_positions": 60,
    "max_target_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 3,
}
#: GPT-2 and its kin.
GPT: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
LLAMA: dict[str, Any] = {**COMMON, "num_key_value_heads": 4, **IDS}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


def opt(hidden: int = 16, layers: int = 2, heads: int = 4) -> dict[str, Any]:
    """Sizes of an OPT."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }


def t5(**options: Any) -> dict[str, Any]:
    """Sizes of a T5."""
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 5,
        "num_decoder_layers": 5,
        "num_heads": 4,
    }
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return {**sizes, "relative_attention_num_buckets": 8, **ids, **options}


def plain(
    names: str | Sequence[str],
    cls: str,
    sizes: Mapping[str, Any],
    tokenizer: Callable[[Path], Any] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    edit: Callable[[Any], None] | None = None,
    revision: str = MAIN,
) -> None:
    """A repository with one model of `cls`, of a config with these options, and its tokenizer."""

    def build(folder: Path, hub: Path) -> None:
        kind = getattr(transformers, cls)
        config = kind.config_class(**sizes)
        torch.manual_seed(seed)
        model = kind(config)
        if edit is not None:
            edit(model)
        model.to(dtype or torch.float32).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer(folder)

    repo(*([names] if isinstance(names, str) else names), revision=revision)(build)


# of a few seeds, one with which the approximation of one method by another stays well inside the test's tolerance
plain(f"{PEFT}/tiny-random-OPTForCausalLM", "OPTForCausalLM", opt(layers=5), tokenizers.opt, seed=2)
# width and depth as in the real one
plain(f"{PEFT}/opt-125m", "OPTForCausalLM", opt(768, 12, 12), tokenizers.opt)
plain(
    [f"{PEFT}/tiny-random-GPT2LMHeadModel", f"{PEFT}/tiny-random-gpt2", f"{HF}/tiny-random-gpt2"],
    "GPT2LMHeadModel",
    GPT,
    tokenizers.gpt2,
)
# real size: a test counts it
plain("gpt2", "GPT2LMHeadModel", {}, tokenizers.gpt2, dtype=torch.bfloat16)
plain(f"{PEFT}/tiny-random-GPTJForCausalLM", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, tokenizers.gpt2)
plain(
    f"{PEFT}/tiny-random-GPTNeoXForCausalLM",
    "GPTNeoXForCausalLM",
    {**BERT, "bos_token_id": 0, "eos_token_id": 0},
    tokenizers.gpt2,
)
plain(
    f"{PEFT}/tiny-random-BloomForCausalLM",
    "BloomForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 5, "n_head": 4, **IDS},
    tokenizers.llama,
)
plain(
    [
        f"{TRL}/tiny-random-LlamaForCausalLM",
        f"{PEFT}/tiny-random-LlamaForCausalLM",
        f"{HF}/tiny-random-LlamaForCausalLM",
    ],
    "LlamaForCausalLM",
    LLAMA,
    tokenizers.llama,
)
plain(
    f"{TRL}/tiny-LlamaForSequenceClassification-3.2",
    "LlamaForSequenceClassification",
    {**LLAMA, "num_labels": 2},
    tokenizers.llama,
)
plain(f"{HF}/tiny-random-MistralForCausalLM", "MistralForCausalLM", {**COMMON, **IDS}, tokenizers.llama)
plain(f"{PEFT}/tiny-dummy-qwen2", "Qwen2ForCausalLM", {**COMMON, **IDS}, tokenizers.llama)
plain("Qwen/Qwen2-0.5B", "Qwen2ForCausalLM", {**COMMON, "tie_word_embeddings": True, **IDS}, tokenizers.llama)
plain(f"{TRL}/tiny-Qwen3ForCausalLM", "Qwen3ForCausalLM", {**COMMON, "head_dim": 8, **IDS}, tokenizers.llama)
plain(
    f"{HF}/tiny-random-Gemma3ForCausalLM",
    "Gemma3ForCausalLM",
    {
        **{**COMMON, "hidden_size": 32},
        "head_dim": 8,
        "sliding_window": 32,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        **IDS,
    },
    tokenizers.llama,
)
plain(
    [f"{TRL}/tiny-Qwen3MoeForCausalLM", f"{HF}/tiny-qwen3-moe"],
    "Qwen3MoeForCausalLM",
    {**COMMON, **MOE, **IDS},
    tokenizers.llama,
)
plain(
    f"{HF}/Mixtral-tiny",
    "MixtralForCausalLM",
    {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, **IDS},
    tokenizers.llama,
)
plain(
    f"{TRL}/tiny-GptOssForCausalLM",
    "GptOssForCausalLM",
    {**COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, **IDS},
    tokenizers.llama,
    dtype=torch.bfloat16,
)
plain(
    f"{TRL}/tiny-Llama4ForCausalLM",
    "Llama4ForCausalLM",
    {
        **COMMON,
        "intermediate_size_mlp": 64,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
        **IDS,
    },
    tokenizers.llama,
)
plain(
    "tiiuae/falcon-mamba-tiny-dev",
    "FalconMambaForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **IDS},
)
plain(
    f"{TRL}/tiny-NemotronHForCausalLM-nano",
    "NemotronHForCausalLM",
    {
        **{k: v for k, v in COMMON.items() if k != "num_hidden_layers"},
        "head_dim": 4,
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        **IDS,
    },
)
for name in (
    "tiny-random-t5",
    "tiny-random-T5ForConditionalGeneration",
    "tiny-random-T5ForConditionalGeneration-calibrated",
):
    plain(f"{PEFT}/{name}", "T5ForConditionalGeneration", t5(), tokenizers.t5)


def _small_head(model: Any) -> None:
    """An untied head of T5 starts with huge logits; and a test compares generations of one length."""
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    model.generation_config.max_new_tokens = 1


# wide enough that ten steps of a test halve the loss
plain(
    "google/flan-t5-small",
    "T5ForConditionalGeneration",
    t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_model=128, d_kv=32, d_ff=256),
    tokenizers.t5,
    edit=_small_head,
)
plain(
    f"{PEFT}/tiny-random-BartForConditionalGeneration",
    "BartForConditionalGeneration",
    {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
    tokenizers.roberta,
)
# with pooler and language model head, so that neither is drawn anew at each load
plain(
    [f"{PEFT}/tiny-random-BertModel", f"{HF}/tiny-random-BertModel", "bert-base-uncased"],
    "BertForPreTraining",
    BERT,
    tokenizers.bert,
)
plain(f"{PEFT}/tiny-random-BertModel", "BertForPreTraining", BERT, tokenizers.bert, seed=2, revision="v2.0.0")
plain(f"{PEFT}/tiny-random-BertForSequenceClassification", "BertForSequenceClassification", BERT, tokenizers.bert)
plain(f"{PEFT}/tiny-random-RobertaModel", "RobertaModel", ROBERTA, tokenizers.roberta)
plain(
    f"{PEFT}/tiny-random-RobertaForSequenceClassification",
    "RobertaForSequenceClassification",
    ROBERTA,
    tokenizers.roberta,
)
plain(
    f"{PEFT}/tiny-random-DebertaModel",
    "DebertaModel",
    {**BERT, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]},
    tokenizers.bert,
)
plain(f"{PEFT}/tiny-random-DebertaV2Model", "DebertaV2Model", BERT, tokenizers.bert)
plain(
    f"{PEFT}/tiny-clip-text-2",
    "CLIPTextModelWithProjection",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
)
plain(f"{PEFT}/tiny-random-WhisperForConditionalGeneration", "WhisperForConditionalGeneration", WHISPER)
