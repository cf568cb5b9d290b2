"""Replicated layers, merged for good: an ordinary model of so many layers, which is saved, loads again and computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from peftc import LoraConfig, PeftcWarning, PeftModel, get_peft_model
from peftc.runtime.journal import Journal
from peftc.runtime.session import described, replicas
from tests.defects import put_defect
from tests.integration.test_cli_jobs import run
from tests.methods.exchange import move

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30,
    "pad_token_id": 0, "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4], [4, 5, 3, 7]])
RANGES = [[1, 2], [0, 2], [0, 1]]
SOURCES = [1, 0, 1, 0]
TYPES = ["full_attention", "sliding_attention"]
MOE = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


def gpt2(**more: Any) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, **more))


def neo() -> nn.Module:
    kinds = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=2, attention_types=kinds, window_size=2)
    )


MODELS: Mapping[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), ["q_proj", "down_proj"]),
    "llama-tied": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), ["q_proj"]),
    "gpt2": (gpt2, ["c_attn"]),
    "qwen2-windows": (
        lambda: Qwen2ForCausalLM(
            Qwen2Config(**SIZES, layer_types=TYPES, use_sliding_window=True, sliding_window=2)
        ),
        ["q_proj"],
    ),
    "gemma3-windows": (
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, layer_types=TYPES, sliding_window=2)),
        ["q_proj"],
    ),
    "mixtral": (lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)), ["q_proj"]),
    "qwen2-moe": (lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **MOE)), ["q_proj"]),
}  # fmt: skip
#: models whose layers go by their index in ways that no entry of a config follows, and what is told of them
ODD: Mapping[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "kinds of blocks": (
        lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **MOE, mlp_only_layers=[0])),
        ["q_proj"],
        "a Qwen2MoeSparseMoeBlock, and not a Qwen2MoeMLP",
    ),
    "scale": (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), ["c_attn"], "`scaling` is"),
    "no config": (neo, ["q_proj"], "nothing can be made of it"),
}


def seeded(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def adapted(base: nn.Module, targets: list[str], name: str = "default", **more: Any) -> Any:
    config = LoraConfig(r=2, target_modules=targets, layer_replication=RANGES, task_type="CAUSAL_LM", **more)
    model = get_peft_model(base, config, name)
    move(model)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def saved_and_loaded(merged: Any, folder: Path) -> Any:
    merged.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_model_is_saved_and_loads_again(kind: str, tmp_path: Path) -> None:
    make, targets = MODELS[kind]
    model = adapted(seeded(make), targets)
    y, plain = logits(model), logits(seeded(make))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), y)
    assert (y - plain).abs().max() > 1e-3
    loaded = saved_and_loaded(merged, tmp_path)
    assert loaded.config.num_hidden_layers == len(SOURCES)
    assert torch.equal(logits(loaded), logits(merged))
    memories = [p.data_ptr() for p in merged.parameters()]
    assert len(set(memories)) == len(memories)
    assert all(not p.requires_grad for p in merged.parameters())


def second(**more: Any) -> Callable[[Any], None]:
    """Adds an adapter of the same layers."""

    def add(model: Any) -> None:
        model.add_adapter("two", LoraConfig(r=2, target_modules=["v_proj"], layer_replication=RANGES, **more))
        model.base_model.set_adapter(["default", "two"])
        move(model, 3)

    return add


def merged_and_off(model: Any) -> None:
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


#: what is done to a model before it is merged, and the adapters that are merged if not the active ones
STATES: Mapping[str, tuple[Callable[[Any], object], list[str] | None]] = {
    "several": (second(), None),
    "one of several": (second(), ["two"]),
    "merged already": (merged_and_off, None),
    "bfloat16": (lambda model: model.to(torch.bfloat16), None),
    "float64": (lambda model: model.double(), None),
    "modules trained whole": (second(modules_to_save=["input_layernorm"]), None),
    "rows of embeddings": (second(trainable_token_indices=[1, 2]), ["two"]),
    "another variant": (second(use_dora=True), None),
}


@pytest.mark.parametrize("state", STATES)
def test_in_every_state(state: str, tmp_path: Path) -> None:
    change, names = STATES[state]
    make, targets = MODELS["qwen2-windows"]  # it has biases
    model = adapted(seeded(make), targets)
    change(model)
    if names:
        model.base_model.set_adapter(names)
    y = logits(model)
    if names:
        model.base_model.set_adapter(["default"])
    merged = model.merge_and_unload(adapter_names=names, safe_merge=True)
    exact = {} if y.dtype is not torch.bfloat16 else {"rtol": 0.1, "atol": 5e-3}
    torch.testing.assert_close(logits(merged), y, **exact)
    loaded = saved_and_loaded(merged, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(merged), **exact)
    assert loaded.dtype == merged.dtype
    assert len({p.data_ptr() for p in merged.parameters()}) == len(list(merged.parameters()))


def test_trained_biases_that_replicas_share(tmp_path: Path) -> None:
    make, targets = MODELS["qwen2-windows"]
    model = adapted(seeded(make), targets, bias="all")
    y = logits(model)
    torch.testing.assert_close(logits(saved_and_loaded(model.merge_and_unload(), tmp_path)), y)


def test_disabled_adapters_are_merged_all_the_same(tmp_path: Path) -> None:
    make, targets = MODELS["llama"]
    model = adapted(seeded(make), targets)
    y = logits(model)
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(logits(saved_and_loaded(model.merge_and_unload(), tmp_path)), y)


def test_the_reference_merges_replicas_into_each_other(tmp_path: Path) -> None:
    make, targets = MODELS["llama"]
    adapted(seeded(make), targets).save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(seeded(make), tmp_path)
    theirs = peft.PeftModel.from_pretrained(seeded(make), tmp_path)
    y = logits(ours)
    torch.testing.assert_close(logits(theirs), y)
    merged = theirs.merge_and_unload()
    assert not torch.allclose(logits(merged), y, atol=1e-3)
    with pytest.raises(RuntimeError, match="shared tensors"):
        merged.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(saved_and_loaded(ours.merge_and_unload(), tmp_path / "ours")), y)


def test_layers_without_replicas_keep_their_tensors() -> None:
    make, targets = MODELS["llama"]
    base = seeded(make)
    before = {id(p) for p in base.parameters()}
    norms = [p for layer in base.model.layers for p in layer.input_layernorm.parameters()]
    merged = adapted(base, targets).merge_and_unload()
    assert {id(p) for p in merged.parameters()} & before >= {id(p) for p in norms}
    assert merged is base


def test_a_failure_afterwards_leaves_all_adapted() -> None:
    make, targets = MODELS["llama"]
    model = adapted(seeded(make), targets)
    y, before = logits(model), [(name, id(p)) for name, p in model.named_parameters()]
    with pytest.raises(RuntimeError, match="on purpose"), Journal():
        model.merge_and_unload()
        raise RuntimeError("on purpose")
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert torch.equal(logits(model), y)


# configs that cannot say what the layers are ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ODD)
def test_a_config_that_does_not_describe_the_layers_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, targets, says = ODD[kind]
    model = adapted(seeded(make), targets)
    y = logits(model)
    with pytest.warns(PeftcWarning, match=f"PC457.*{says}"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), y)


def test_layers_of_a_quantised_model_are_not_compared() -> None:
    make, targets, _ = ODD["kinds of blocks"]
    base = seeded(make)
    base.config.quantization_config = {"quant_method": "none"}
    adapted(base, targets).merge_and_unload()


# the command -------------------------------------------------------------------------------------------------------------


def saved(make: Callable[[], nn.Module], targets: list[str], place: Path) -> tuple[Path, Tensor]:
    """A base and an adapter of it in folders; the adapter's, and what the adapted model gives."""
    seeded(make).save_pretrained(place / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(place / "base").eval(), targets)
    model.save_pretrained(place / "adapter")
    return place / "adapter", logits(model)


@pytest.mark.parametrize("words", [(), ("--untie",), ("--dtype", "bfloat16")], ids=["plain", "untied", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mixtral"])
def test_the_command(kind: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, y = saved(*MODELS[kind], tmp_path)
    code, told, err = run(capsys, "merge", adapter, "-o", tmp_path / "out", "--json", *words)
    assert code == 0, told + err
    facts = json.loads(told)
    assert facts["built"] is True and facts["because"] == "the adapter replicates layers"
    assert "The model is built: the adapter replicates layers" in err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    exact = {"rtol": 0.1, "atol": 2e-2} if "bfloat16" in words else {}
    torch.testing.assert_close(logits(loaded).float(), y, **exact)
    assert facts["parameters"] == loaded.num_parameters() and loaded.config.num_hidden_layers == len(SOURCES)


@pytest.mark.parametrize("ranges", [RANGES, [[1, 2]], [[1, 2], [1, 2]]], ids=str)
def test_another_base_is_told_by_the_layers_that_are_adapted(
    ranges: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, targets = MODELS["llama"]
    base = seeded(make)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.model.layers[1].self_attn.q_proj.weight.add_(1)
    base.save_pretrained(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, layer_replication=ranges))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    for name, code in (("base", 0), ("other", 1)):
        done, _, err = run(
            capsys, "merge", tmp_path / "adapter", "-o", tmp_path / f"{name} m", "--base", tmp_path / name
        )
        assert done == code, err
        assert ("PC610" in err) is bool(code)
    with pytest.warns(PeftcWarning, match="PC610.*such as `model.layers.1.self_attn.q_proj.weight`"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), tmp_path / "adapter")


@pytest.mark.parametrize("kind", ODD)
def test_the_command_refuses_a_model_that_would_load_as_another(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, targets, says = ODD[kind]
    adapter, _ = saved(make, targets, tmp_path)
    code, told, err = run(capsys, "merge", adapter, "-o", tmp_path / "out")
    assert code == 1 and "error[PC457]" in told + err and says in told + err
    assert not (tmp_path / "out").exists()


# defects -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "before", "after", "test"),
    [
        (replicas, "_own_parameters(block, held)", "pass", "llama"),
        (replicas, "id(parameter) in others", "id(parameter) not in others", "llama"),
        (described, "type(now) is not type(then)", "False", "kinds of blocks"),
        (described, "other[name] != value", "False", "scale"),
        (described, 'f"nothing can be made of it ({error})"', '""', "no config"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_defects_are_found(
    module: Any, before: str, after: str, test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_defect(monkeypatch, module, before, after)
    with pytest.raises((RuntimeError, AssertionError, pytest.fail.Exception)):
        if test in MODELS:
            test_a_merged_model_is_saved_and_loads_again(test, tmp_path)
        else:
            test_a_config_that_does_not_describe_the_layers_is_told(test, monkeypatch)
