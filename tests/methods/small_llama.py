"""The small Llama that tests of embeddings, rows and layers are about, and what it says to two rows of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30,
    "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4], [4, 5, 3, 7]])


def llama(tied: bool = True, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """A fresh one, equal to every other of these options."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": tied, **more})).to(dtype).eval()


def logits(model: nn.Module, **more: Any) -> Tensor:
    return model(input_ids=IDS, **more).logits
