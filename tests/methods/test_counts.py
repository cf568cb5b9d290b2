"""Options that are counts may be any whole number of 64 bits: what they ask for is refused at once, and is never made first."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from peftc import PeftcError, compile_plan, get_peft_config
from peftc.graph.nodes import ModuleGraph
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.models import MODELS

MANY = 2**40


def llama() -> ModuleGraph:
    return snapshot(next(model for model in MODELS if model.name == "llama").build())


CASES: dict[str, dict[str, Any]] = {
    "butterfly factors": {"peft_type": "BOFT", "boft_block_size": 2, "boft_n_butterfly_factor": MANY},
    "blocks": {"peft_type": "OFT", "oft_block_size": 0, "r": MANY},
    "features of a block": {"peft_type": "OFT", "oft_block_size": MANY},
    "recurrent layers": {
        "peft_type": "P_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 4,
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": MANY,
    },
    "layers of a router": {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "hidden_size": 16,
        "xlora_depth": MANY,
        "adapters": {"a": "nowhere"},
    },
    "coefficients": {"peft_type": "FOURIERFT", "n_frequency": MANY},
    "rank": {"peft_type": "LORA", "r": MANY},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_count_beyond_measure_is_told_at_once(options: dict[str, Any]) -> None:
    graph, start = llama(), time.process_time()
    with suppress(PeftcError):
        compile_plan(graph, {"default": get_peft_config(options)})
    assert time.process_time() - start < 5


@pytest.mark.parametrize("method", ["OFT", "BOFT", "LOKR"])
@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_many_features_is_planned_at_once(method: str) -> None:
    """A number with few divisors."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**40 - 87, 1))
    start = time.process_time()
    with suppress(PeftcError):
        compile_plan(snapshot(model), {"default": get_peft_config({"peft_type": method, "target_modules": ["0"]})})
    assert time.process_time() - start < 5


@pytest.mark.parametrize("method", ["OFT", "BOFT", "LOKR", "HRA"])
@pytest.mark.filterwarnings("ignore")
def test_a_layer_without_features_is_planned_at_once_or_told(method: str) -> None:
    start = time.process_time()
    with suppress(PeftcError):
        options = {"peft_type": method, "target_modules": ["0"]}
        compile_plan(snapshot(nn.Sequential(nn.Linear(0, 4))), {"default": get_peft_config(options)})
    assert time.process_time() - start < 5
