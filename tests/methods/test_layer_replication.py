"""`layer_replication` of LoRA: a deeper model of shared weights, in the plan and live, there and back, beside the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftc import LoraConfig, PeftcError, PeftcWarning, PeftModel, compile_plan, get_peft_model
from peftc.compiler.explain import explain
from peftc.compiler.plan.render import render_plan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.runtime.applying.apply import apply_plan
from peftc.runtime.applying.snapshot import snapshot
from tests.methods.exchange import move
from tests.methods.small_llama import IDS, SIZES, logits
from tests.methods.small_llama import llama as small_llama

RANGES = [[0, 2], [1, 3], [0, 1]]
SOURCES = [0, 1, 1, 2, 0]


def llama(tied: bool = True) -> nn.Module:
    return small_llama(tied, num_hidden_layers=3, num_key_value_heads=2)


def options(**more: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": ["q_proj", "down_proj"], "layer_replication": RANGES, **more}


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**options(**more))


def state(model: nn.Module) -> dict[str, Any]:
    """What there is of a base model: its modules, tensors, indices and config."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "tensors": {name: (id(t), t.clone()) for name, t in model.named_parameters()}.keys(),
        "indices": [m.layer_idx for m in model.modules() if "layer_idx" in m.__dict__],
        "config": model.config.to_dict(),
    }


def deep(base: nn.Module) -> nn.Module:
    """The same as an ordinary model of so many layers, with weights of their own."""
    made = copy.deepcopy(base)
    made.model.layers = nn.ModuleList(copy.deepcopy(base.model.layers[source]) for source in SOURCES)
    for index, layer in enumerate(made.model.layers):
        layer.self_attn.layer_idx = index
    made.config.num_hidden_layers = len(SOURCES)
    return made


def test_a_plan_has_the_replicas_without_weights() -> None:
    graph = snapshot(llama())
    plan = compile_plan(graph, {"default": config()})
    paths = [site.path for site in plan.adapters[0].maps if site.path.endswith("q_proj")]
    assert paths == [f"model.layers.{index}.self_attn.q_proj" for index in range(5)]
    assert plan.base_numel == graph.numel and not plan.warnings
    assert plan.model.dims["num_hidden_layers"] == 5
    assert "model.layers.{0..4}.self_attn.q_proj" in render_plan(plan)
    told = explain(graph, "default", config(), "model.layers.4.self_attn.q_proj")
    assert "Adapted" in told.verdict
    model = get_peft_model(llama(), config())
    live = snapshot(model.get_base_model())
    assert plan.graph is not None
    assert (live.nodes, live.ties, live.model, live.digest) == (
        plan.graph.nodes, plan.graph.ties, plan.graph.model, plan.graph.digest,
    )  # fmt: skip
    assert plan.counts() == model.get_nb_trainable_parameters()
    assert {p.name for p in plan.parameters()} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_plan_from_a_file_is_applied_to_the_base() -> None:
    plan = plan_from_json(plan_to_json(compile_plan(snapshot(llama()), {"default": config()})))
    base = llama()
    apply_plan(base, plan)
    assert len(base.model.layers) == 5
    with pytest.raises(PeftcError, match="PC427"):
        torch.manual_seed(0)
        apply_plan(LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 4})), plan)


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_deeper_model_in_every_state(tied: bool, tmp_path: Path) -> None:
    base = llama(tied)
    expected, before = logits(deep(base)), state(base)
    plain = logits(base)
    model = get_peft_model(base, config())
    torch.testing.assert_close(logits(model), expected)
    assert base.config.num_hidden_layers == 5
    indices = [layer.self_attn.layer_idx for layer in base.model.layers]
    assert indices == [0, 1, 2, 3, 4]
    move(model)
    y = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), y)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    assert model.unload() is base
    assert torch.equal(logits(base), plain)
    assert state(base) == before
    merged = twin.merge_and_unload()
    assert len(merged.model.layers) == merged.config.num_hidden_layers == 5
    torch.testing.assert_close(logits(merged), y)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_generation_with_a_cache_is_that_without() -> None:
    model = get_peft_model(llama(), config())
    move(model)
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [model.generate(input_ids=IDS, use_cache=cache, **given) for cache in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["llama", "bert", "falcon", "qwen2 with windows", "gpt2"])
def test_kinds_of_models(kind: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        few = {**SIZES, "num_hidden_layers": 2}
        if kind == "bert":
            return BertModel(BertConfig(**few)).eval()
        if kind == "falcon":
            return FalconForCausalLM(FalconConfig(**few)).eval()
        if kind == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30}
            return GPT2LMHeadModel(GPT2Config(**sizes)).eval()
        if kind.startswith("qwen2"):
            types = ["full_attention", "sliding_attention"]
            return Qwen2ForCausalLM(
                Qwen2Config(**few, layer_types=types, use_sliding_window=True, sliding_window=2)
            ).eval()
        return LlamaForCausalLM(LlamaConfig(**few)).eval()

    def y(model: nn.Module) -> Tensor:
        return model(input_ids=IDS)[0]

    targets = {"bert": ["query"], "falcon": ["query_key_value"], "gpt2": ["c_attn"]}.get(kind, ["q_proj"])
    asked = options(target_modules=targets, layer_replication=[[1, 2], [0, 2]])
    original = base()
    ours = get_peft_model(original, LoraConfig(**asked))
    move(ours)
    found = y(ours)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(y(PeftModel.from_pretrained(base(), tmp_path)), found)
    if kind in ("llama", "bert"):  # the reference has no way with the others
        torch.testing.assert_close(y(peft.PeftModel.from_pretrained(base(), tmp_path)), found)
    if kind.startswith("qwen2"):
        assert original.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    ours.unload()
    torch.testing.assert_close(y(original), y(base()))
    assert original.config.to_dict() == base().config.to_dict()


def test_both_libraries_compute_the_same_and_read_each_others_files(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options()))
    move(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(llama(), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    grads = []
    for model in (ours, theirs):
        logits(model).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")), logits(theirs))
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()


def test_adapters_on_one_model_have_the_same_layers(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(), "one")
    model.add_adapter("two", config(target_modules=["v_proj"]))
    found = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        move(model, sum(name.encode()))
        found[name] = logits(model)
    mixed = logits(model, adapter_names=["one", "two"])
    torch.testing.assert_close(mixed, torch.stack([found["one"][0], found["two"][1]]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "one", "one")
    loaded.load_adapter(str(tmp_path / "two"), "two")
    loaded.set_adapter("two")
    torch.testing.assert_close(logits(loaded), found["two"])
    for other in (None, [[0, 3]]):
        with pytest.raises(PeftcError, match="PC431"):
            model.add_adapter("three", config(layer_replication=other))
    plain = get_peft_model(llama(), config(layer_replication=None))
    with pytest.raises(PeftcError, match="PC431"):
        plain.add_adapter("deep", config())
    assert len(plain.get_base_model().model.layers) == 3
    with pytest.raises(PeftcError, match="PC431"):
        compile_plan(snapshot(llama()), {"a": config(), "b": config(layer_replication=None)})
    model.delete_adapter("two")
    model.delete_adapter("one")
    with pytest.raises(PeftcError, match=r"PC431.*are replicated"):
        model.add_adapter("three", config(layer_replication=None))
    model.add_adapter("four", config())
    assert len(model.get_base_model().model.layers) == 5


def test_layers_that_are_left_out_come_back() -> None:
    base = llama()
    plain = logits(llama().double())
    model = get_peft_model(base, config(layer_replication=[[2, 3]]))
    assert len(base.model.layers) == 1
    model.double()
    model.unload()
    assert len(base.model.layers) == 3
    assert {p.dtype for p in base.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(base), plain)


def test_modules_and_biases_that_train_along(tmp_path: Path) -> None:
    model = get_peft_model(llama(False), config(modules_to_save=["lm_head"], trainable_token_indices=[1, 2]))
    move(model)
    y = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(False), tmp_path)), y)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(llama(False), tmp_path)), y)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    return T5ForConditionalGeneration(T5Config(**sizes))


@pytest.mark.parametrize(
    ("make", "ranges", "says"),
    [
        (llama, [[0, 4]], r"has the layers 0 to 2, and `layer_replication` has the range \[0, 4\]"),
        (t5, [[0, 1]], "Could not locate the layers"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), [[0, 1]], "Could not locate the layers"),
    ],
    ids=["beyond", "two stacks", "no stack"],
)
def test_what_cannot_be_is_refused_with_nothing_changed(make: Any, ranges: list[list[int]], says: str) -> None:
    base = make()
    before = [(name, id(module)) for name, module in base.named_modules()]
    with pytest.raises(PeftcError, match=says) as caught:
        get_peft_model(base, config(layer_replication=ranges))
    assert ("PC457", "$.adapters.default.layer_replication") in {
        (d.code, d.where.path) for d in caught.value.diagnostics
    }
    assert before == [(name, id(module)) for name, module in base.named_modules()]


@pytest.mark.parametrize("ranges", [[[2, 2]], [[3, 1]], [[-1, 1]], [[0]], [[0, 1, 2]], [[0, "a"]]], ids=str)
def test_ranges_that_are_none_are_refused_before_there_is_a_model(ranges: Any) -> None:
    with pytest.raises(PeftcError, match=r"layer_replication\[0\]"):
        config(layer_replication=ranges)


def test_no_range_is_no_effect() -> None:
    with pytest.warns(PeftcWarning, match="`layer_replication` is empty"):
        model = get_peft_model(llama(), config(layer_replication=[]))
    assert len(model.get_base_model().model.layers) == 3


def test_a_failure_afterwards_leaves_the_model_as_it_was() -> None:
    base = llama()
    before = state(base)
    with pytest.raises(PeftcError):
        get_peft_model(base, config(), adapter_name="a.b")
    assert state(base) == before
    with pytest.raises(RuntimeError, match="on purpose"):
        from peftc.runtime.journal import Journal

        with Journal():
            get_peft_model(base, config())
            raise RuntimeError("on purpose")
    assert state(base) == before
