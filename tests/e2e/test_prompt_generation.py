"""What is generated with a cache is what whole forward passes give, one token at a time and without one: every prompt method,
on every class of model, in every way to generate. No other library is the measure here."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peftc import PeftModel, get_peft_model
from peftc.diagnostics import ConfigError
from peftc.host import caches
from peftc.registry.manager import default_registry
from peftc.testing.models import seeded
from peftc.tuner.prompt import PromptTuner

pytestmark = [pytest.mark.filterwarnings("ignore")]

TOKENS = 5

_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 60}
_SIZES = {**_ENDS, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_BOTH = {**_ENDS, "d_model": 16, "decoder_start_token_id": 1, "forced_eos_token_id": None}

#: model type -> options: rotary, learned and relative positions, with and without windows, experts, and encoder-decoders
MODELS: dict[str, Mapping[str, Any]] = {
    "llama": _GROUPED,
    "gpt2": {**_SIZES, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "opt": {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {**_SIZES, "n_head": 2, "n_layer": 2},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {**_GROUPED, "num_local_experts": 2, "sliding_window": None},
    "t5": {**_BOTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "bart": {
        **_BOTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    },
}  # fmt: skip

#: Ways that give other tokens than the likeliest one after the other; the same without a cache is their measure.
OTHER_WAYS: dict[str, Mapping[str, Any]] = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
}

METHODS = [name for name in default_registry().names if default_registry().get(name).is_prompt]


def prompted(method_name: str, model_type: str) -> PeftModel:
    """A tiny model of the type with an adapter of the method that acts."""
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    method = default_registry().get(method_name)
    task = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    options = next(iter(method.examples), {})
    with seeded(1):
        base = auto.from_config(config).eval()
        model = get_peft_model(base, method.config(task_type=task, **options)).eval()
        for parameter in model.prompt_encoder.parameters():
            parameter.data.add_(0.7 * torch.randn(parameter.shape))
    return model


def asked(model: PeftModel, padding: str = "") -> dict[str, Any]:
    """Keywords of `generate`; one row of two is padded on that side."""
    ids = torch.tensor([[5, 9, 23, 31, 9, 23], [7, 8, 40, 7, 8, 40]])
    mask = torch.ones_like(ids)
    if padding:
        mask[0, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
    call = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    tuner = default_registry().method_of(model.active_peft_config).tuner
    assert isinstance(tuner, PromptTuner)
    tasks = tuner.tasks(model.active_peft_config)
    if tasks is not None:
        call["task_ids"] = torch.arange(2) % tasks
    return call


def generated(model: PeftModel, call: Mapping[str, Any], **way: Any) -> Tensor:
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, **way}
    with seeded(5):
        return model.generate(**call, **options)


def by_hand(model: PeftModel, call: Mapping[str, Any]) -> Tensor:
    """The likeliest tokens, one whole forward pass for each."""
    call = dict(call)
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    if name not in call:
        call[name] = torch.ones(2, 1, dtype=torch.long)
    for _ in range(TOKENS):
        if model.active_peft_config.peft_type in BEHIND_KEYS and name == "input_ids":  # generation counts no padding
            mask = call["attention_mask"]
            call["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        with torch.no_grad():
            logits = model(**call, use_cache=False).logits[:, -1].clone()
        logits[:, 2] = -torch.inf  # `min_new_tokens` keeps the end away
        call[name] = torch.cat([call[name], logits.argmax(-1, keepdim=True)], dim=1)
        if name == "input_ids":
            call["attention_mask"] = torch.cat([call["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    return call[name]


BEHIND_KEYS = {
    name
    for name in METHODS
    if isinstance(tuner := default_registry().get(name).tuner, PromptTuner) and tuner.place.is_cache
}


def possible(method_name: str, model_type: str) -> bool:
    """Whether the method has a config for the model's task at all."""
    method, encodes = default_registry().get(method_name), model_type in ("t5", "bart")
    try:
        method.config(task_type="SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM", **next(iter(method.examples), {}))
    except ConfigError:
        return False
    return True


@cache
def without_static_cache(model_type: str) -> str:
    """Why transformers itself, without an adapter, cannot generate with a static cache here; `""` if it can."""
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    base = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config).eval()
    ids = torch.tensor([[5, 9, 23]])
    try:
        base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, cache_implementation="static")
    except ValueError as error:  # the masks of BLOOM before 5.21
        return f"transformers {transformers.__version__} cannot do it for {model_type}: {error}"
    return ""


CELLS = [(method, model_type) for model_type in MODELS for method in METHODS if possible(method, model_type)]


@pytest.mark.parametrize(("method", "model_type"), CELLS)
def test_what_is_generated_with_a_cache_is_what_forward_passes_give(method: str, model_type: str) -> None:
    model = prompted(method, model_type)
    lacking = without_static_cache(model_type)
    kinds: list[dict[str, Any]] = [{}] if lacking else [{}, {"cache_implementation": "static"}]
    for padding in ("", "left", "right"):
        call = asked(model, padding)
        expected = by_hand(model, call).tolist()
        for way in (*kinds, {"use_cache": False}):
            assert generated(model, call, **way).tolist() == expected, (padding, way)
        for way_name, way in OTHER_WAYS.items():
            whole = generated(model, call, **way, use_cache=False).tolist()
            for kind in kinds:
                assert generated(model, call, **way, **kind).tolist() == whole, (padding, way_name, kind)
    one = {name: tensor[:1] for name, tensor in asked(model).items()}
    assert generated(model, one, prompt_lookup_num_tokens=2).tolist() == generated(model, one).tolist(), "assisted"
    if lacking:
        pytest.skip(f"static caches are left out, all else holds: {lacking}")


@pytest.mark.parametrize(("method", "model_type"), [cell for cell in CELLS if cell[1] not in ("t5", "bart")])
def test_a_conversation_goes_on_from_its_cache(method: str, model_type: str) -> None:
    """With the whole of it, or with what is new alone; from the cache itself or from a copy."""
    model = prompted(method, model_type)
    call = asked(model)
    first = generated(model, call, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[11, 12], [13, 14]])], dim=1)
    whole = {**call, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    expected = by_hand(model, whole)
    name, past = caches.keyword(model.get_base_model()), caches.of_outputs(first)
    assert generated(model, whole, **{name: deepcopy(past)}).tolist() == expected.tolist()
    new = longer[:, caches.length(past) - model.active_peft_config.num_virtual_tokens :]
    found = generated(model, {**whole, "input_ids": new}, **{name: deepcopy(past)})
    assert found[:, -TOKENS:].tolist() == expected[:, -TOKENS:].tolist()
