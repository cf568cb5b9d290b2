"""A model built again of its config: what transformers is relied on for."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftc.host.architectures import as_configured


def llama() -> Any:
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": 9,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_it_has_what_the_config_says_and_no_storage() -> None:
    model = llama()
    model.config.num_hidden_layers = 3
    made: Any = as_configured(model)
    assert len(made.model.layers) == 3 and all(p.is_meta for p in made.parameters())
    assert model.config.num_hidden_layers == 3 and len(model.model.layers) == 2


def test_values_that_do_not_go_together() -> None:
    model = llama()
    model.config.hidden_act = "none"
    with pytest.raises(ValueError, match="none"):
        as_configured(model)


def test_there_is_none_of_what_a_config_does_not_make() -> None:
    assert as_configured(nn.Linear(2, 2)) is None
    model = llama()
    model.config.quantization_config = {"quant_method": "none"}
    assert as_configured(model) is None
