"""Adaption prompts: the paper's formula, the reference side by side, switching between adapters, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from peftc import AdaptedAttention, AdaptionPromptConfig, AdaptionPromptModel, PeftcError, PeftModel
from peftc.compiler.compile import compile_plan
from peftc.compiler.explain import explain, render_explanation
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.render import render_plan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.model.mapping import inject_adapter_in_model
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.compare import objects_of, state_of

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROOT = "base_model.model.model.layers"


def base(kind: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa", **options: Any) -> Any:
    """A tiny language model, always the same."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **TOKENS, **options)
    else:
        cls = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind]
        config = cls(**{**SIZES, "num_key_value_heads": 2, "initializer_range": 0.2, **TOKENS, **options})
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def batch() -> dict[str, Tensor]:
    """Three rows, the first padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def move(model: nn.Module) -> None:
    """Give trainable tensors values by their names."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            seed = torch.Generator().manual_seed(sum(name.encode()))
            p.data = torch.randn(p.shape, generator=seed).to(p.dtype)


def wrapped(library: ModuleType, model: Any = None, **options: Any) -> Any:
    """The model with an adapter that acts."""
    values = {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM", **options}
    model = library.get_peft_model(base() if model is None else model, library.AdaptionPromptConfig(**values)).eval()
    move(model)
    return model


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch()).logits


# the formula ----------------------------------------------------------------------------------------------------------


def test_the_paper_s_formula_in_one_attention() -> None:
    model = wrapped(peftc, adapter_layers=1)
    layer = model.get_base_model().model.layers[2].self_attn
    assert isinstance(layer, AdaptedAttention)
    inner, x = layer.model, torch.randn(2, 5, 32)
    positions = model.get_base_model().model.rotary_emb(x, torch.arange(5)[None])
    call = {"hidden_states": x, "position_embeddings": positions, "attention_mask": None}
    with torch.no_grad():
        added = layer(**call)[0] - inner(**call)[0]
        expected = torch.zeros(2, 5, 32)
        for head in range(4):
            rows, group = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            q = x @ inner.q_proj.weight[rows].T
            half = torch.cat([-q[..., 4:], q[..., :4]], -1)
            q = q * positions[0] + half * positions[1]
            k, v = (layer.adaption_prompt[0] @ w.weight[group].T for w in (inner.k_proj, inner.v_proj))
            seen = layer.adaption_gate * torch.softmax(q @ k.T / 8**0.5, -1) @ v
            expected += seen @ inner.o_proj.weight[:, rows].T
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"attention_bias": True}, {"head_dim": 16}], ids=["biases", "wide heads"])
def test_a_closed_gate_changes_nothing(options: dict[str, Any]) -> None:
    model = base(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = logits(model)
    adapted = peftc.get_peft_model(model, AdaptionPromptConfig(adapter_len=4, adapter_layers=2))
    assert torch.equal(logits(adapted), before)
    move(adapted)
    assert not torch.allclose(logits(adapted), before)


# the reference --------------------------------------------------------------------------------------------------------

KINDS = {
    "llama": {},
    "llama, eager": {"attention": "eager"},
    "mistral": {"kind": "mistral"},
    "mistral, short window": {"kind": "mistral", "sliding_window": 4},
    "gpt2": {"kind": "gpt2"},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def test_it_is_the_reference_s(kind: dict[str, Any]) -> None:
    theirs, ours = wrapped(peft, base(**kind)), wrapped(peftc, base(**kind))
    assert names(ours) == names(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    grown = []
    for model in (theirs, ours):
        out = model(**batch(), labels=batch()["input_ids"])
        out.loss.backward()
        grown.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
    assert grown[1].keys() == grown[0].keys()
    for name, gradient in grown[0].items():
        torch.testing.assert_close(grown[1][name], gradient, atol=1e-5, rtol=1e-4)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(logits(ours), logits(theirs))


def test_generation_is_the_reference_s_with_and_without_a_cache(kind: dict[str, Any]) -> None:
    theirs, ours = wrapped(peft, base(**kind)), wrapped(peftc, base(**kind))
    options = {**batch(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(**options)
    assert not torch.equal(expected, base(**kind).generate(**options))
    for use_cache in (True, False):
        assert torch.equal(ours.generate(**options, use_cache=use_cache), expected)


@pytest.mark.parametrize(("saves", "loads"), [(peft, peftc), (peftc, peft)], ids=["theirs to ours", "ours to theirs"])
def test_folders_go_both_ways(saves: ModuleType, loads: ModuleType, kind: dict[str, Any], tmp_path: Path) -> None:
    saved = wrapped(saves, base(**kind))
    saved.save_pretrained(tmp_path)
    loaded = loads.PeftModel.from_pretrained(base(**kind), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(saved), atol=1e-5, rtol=1e-4)
    config = loads.PeftConfig.from_pretrained(tmp_path)
    assert (config.adapter_len, config.adapter_layers) == (4, 2)
    assert config.target_modules == ("attn" if kind.get("kind") == "gpt2" else "self_attn")


def test_the_config_says_what_it_is() -> None:
    config = AdaptionPromptConfig()
    theirs = peft.AdaptionPromptConfig()
    assert config.is_adaption_prompt and theirs.is_adaption_prompt
    assert config.is_prompt_learning == theirs.is_prompt_learning
    assert isinstance(wrapped(peftc).base_model, AdaptionPromptModel)


# several adapters -----------------------------------------------------------------------------------------------------


def config(library: ModuleType, layers: int) -> Any:
    return library.AdaptionPromptConfig(adapter_len=4, adapter_layers=layers, task_type="CAUSAL_LM")


STEPS: dict[str, Callable[[Any, ModuleType], object]] = {
    "add": lambda m, library: m.add_adapter("other", config(library, 1)),
    "switch": lambda m, library: m.set_adapter("other"),
    "add a third": lambda m, library: m.add_adapter("third", config(library, 3)),
    "back": lambda m, library: m.set_adapter("default"),
    "delete one aside": lambda m, library: m.delete_adapter("other"),
    "to the third": lambda m, library: m.set_adapter("third"),
    "delete the first": lambda m, library: m.delete_adapter("default"),
}


def test_names_and_outputs_follow_the_active_adapter_as_in_the_reference() -> None:
    theirs, ours = wrapped(peft), wrapped(peftc)
    for step, act in STEPS.items():
        act(theirs, peft)
        act(ours, peftc)
        assert names(ours) == names(theirs), step
        if step in ("switch", "to the third"):
            move(theirs)
            move(ours)
        torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters(), step


def planned(**layers: int) -> InjectionPlan:
    return compile_plan(snapshot(base()), {name: config(peftc, n) for name, n in layers.items()})


@pytest.mark.parametrize("active", ["one", "two"])
def test_a_plan_of_several_says_what_the_model_has(active: str) -> None:
    configs = {"one": config(peftc, 1), "two": config(peftc, 2)}
    plan = compile_plan(snapshot(base()), configs, active=[active])
    model = PeftModel.from_plan(base(), plan)
    live = {name: p.requires_grad for name, p in model.named_parameters() if "adaption_" in name}
    assert {p.name: p.trainable for p in plan.parameters()} == live
    assert plan.counts() == model.get_nb_trainable_parameters()
    assert plan_from_json(plan_to_json(plan)) == plan
    assert "not active, kept aside" in render_plan(plan)


def test_an_adapter_aside_is_saved_and_loaded_over(tmp_path: Path) -> None:
    model = wrapped(peftc)
    model.add_adapter("other", config(peftc, 1))
    model.set_adapter("other")
    move(model)
    y = logits(model)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    fresh = wrapped(peftc)
    fresh.add_adapter("other", config(peftc, 1))
    before = logits(fresh)
    assert fresh.load_adapter(tmp_path / "other", "other").is_clean
    assert torch.equal(logits(fresh), before)
    fresh.set_adapter("other")
    assert torch.equal(logits(fresh), y)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "other").eval()
    torch.testing.assert_close(logits(theirs), y, atol=1e-5, rtol=1e-4)


def test_state_dicts_of_an_adapter_aside() -> None:
    model = wrapped(peftc)
    model.add_adapter("other", config(peftc, 1))
    model.set_adapter("other")
    move(model)
    y, state = (
        logits(model),
        {k: v.clone() for k, v in peftc.get_peft_model_state_dict(model, adapter_name="other").items()},
    )
    model.set_adapter("default")
    aside = peftc.get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name="other")
    assert all(torch.equal(aside[key], tensor) for key, tensor in state.items()) and aside.keys() == state.keys()
    fresh = wrapped(peftc)
    fresh.add_adapter("other", config(peftc, 1))
    before = logits(fresh)
    assert peftc.set_peft_model_state_dict(fresh, state, "other") == ([], [])
    assert torch.equal(logits(fresh), before)
    fresh.set_adapter("other")
    assert torch.equal(logits(fresh), y)
    saved = wrapped(peft)
    theirs = peft.set_peft_model_state_dict(saved, peftc.get_peft_model_state_dict(wrapped(peftc)))
    assert not theirs.unexpected_keys
    torch.testing.assert_close(logits(saved), logits(wrapped(peftc)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aside", [False, True])
def test_an_adapter_without_memory_takes_the_tensors_that_come_later(aside: bool) -> None:
    source = wrapped(peftc, adapter_layers=1)
    state = peftc.get_peft_model_state_dict(source)
    model = inject_adapter_in_model(config(peftc, 1), base(), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in model.named_parameters() if "adaption_" in name} == {"meta"}
    if aside:
        model = wrapped(peftc)
        model.add_adapter("other", config(peftc, 1), low_cpu_mem_usage=True)
    peftc.set_peft_model_state_dict(model, state, "other" if aside else "default", low_cpu_mem_usage=True)
    if aside:
        model.set_adapter("other")
    assert torch.equal(logits(model), logits(source))


def test_what_works_on_layers_only_is_refused() -> None:
    model = wrapped(peftc)
    model.add_adapter("other", config(peftc, 1))
    with pytest.raises(PeftcError, match="acts around modules"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    with pytest.raises(PeftcError, match="no tensors on layers"):
        peftc.check_hotswap_configs_compatible(config(peftc, 1), config(peftc, 1))
    state = peftc.get_peft_model_state_dict(model)
    with pytest.raises(PeftcError, match="PC401"):
        inject_adapter_in_model(config(peftc, 1), base(), state_dict=state)
    assert inject_adapter_in_model(config(peftc, 2), base(), state_dict=state)
    assert "ADAPTION_PROMPT" not in peftc.PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_an_adapter_aside_follows_the_model_to_another_device() -> None:
    model = wrapped(peftc)
    model.add_adapter("other", config(peftc, 1))
    model.to("meta")
    assert {t.device.type for t in model.adapter_tensors("other").values()} == {"cpu"}
    model.set_adapter("other")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_two_at_a_time_are_refused_and_change_nothing() -> None:
    model = wrapped(peftc)
    model.add_adapter("other", config(peftc, 1))
    before, y = objects_of(model), logits(model)
    with pytest.raises(PeftcError, match="PC431") as caught:
        model.set_adapter(["default", "other"])
    assert "model.layers.2.self_attn" in str(caught.value)
    assert (objects_of(model), model.active_adapters) == (before, ["default"])
    assert torch.equal(logits(model), y)
    with pytest.raises(PeftcError, match="PC431"):
        compile_plan(snapshot(base()), {"a": config(peftc, 1), "b": config(peftc, 2)}, active=["a", "b"])


def test_unloading_after_all_of_it_restores_the_base() -> None:
    model = base()
    objects, state, y = objects_of(model), state_of(model), logits(model)
    adapted = wrapped(peftc, model)
    adapted.add_adapter("other", config(peftc, 3))
    adapted.set_adapter("other")
    adapted.delete_adapter("default")
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), y)
    assert adapted.unload() is model
    assert objects_of(model) == objects
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), y)


def test_an_unwrapped_model_is_adapted_in_place() -> None:
    model = inject_adapter_in_model(config(peftc, 1), base())
    assert "model.layers.2.self_attn.adaption_gate" in names(model)
    assert snapshot(model).digest == snapshot(base()).digest


# training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(attention: str, reentrant: bool) -> None:
    grown = []
    for checkpointed in (False, True):
        model = wrapped(peftc, base(attention=attention)).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        grown.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in grown[0].items():
        torch.testing.assert_close(grown[1][name], gradient)


def test_an_adapter_learns_beside_a_half_precision_base() -> None:
    model = peftc.get_peft_model(base(dtype=torch.bfloat16), config(peftc, 2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = model(**batch(), labels=batch()["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_whole_model_compiles_to_one_graph(kind: str) -> None:
    model = wrapped(peftc, base(kind))
    expected = logits(model)
    try:
        compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch(), use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
    finally:
        torch._dynamo.reset()


# what is refused ------------------------------------------------------------------------------------------------------


def bert() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str, str]] = {
    "another family": (bert, {}, "PC406", "of model type `bert`"),
    "another family, named": (bert, {"target_modules": "attention"}, "PC406", "gpt2"),
    "no transformers model": (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "PC406", "of class `Sequential`"),
    "more layers than there are": (base, {"adapter_layers": 4}, "PC102", "Set it to 3 at most"),
    "no length": (base, {"adapter_len": None}, "PC117", "`adapter_len` is not set"),
    "no number of layers": (base, {"adapter_layers": None}, "PC117", "`adapter_layers` is not set"),
    "a length of zero": (base, {"adapter_len": 0}, "PC102", "greater than or equal to 1"),
    "a negative number of layers": (base, {"adapter_layers": -1}, "PC102", "greater than or equal to 1"),
    "a name of nothing": (base, {"target_modules": "self_atn"}, "PC407", "Did you mean `self_attn`?"),
    "a module that is no attention": (base, {"target_modules": "mlp"}, "PC401", "LlamaMLP"),
    "a layer": (base, {"target_modules": "q_proj"}, "PC401", "leave `target_modules` out"),
    "a list of names": (base, {"target_modules": ["self_attn"]}, "PC102", "valid string"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused(case: str) -> None:
    make, options, code, says = REFUSED[case]
    model = make()
    before = objects_of(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(PeftcError, match=code) as caught:
        wrapped(peftc, model, **options)
    assert says in str(caught.value)
    assert (objects_of(model), [p.requires_grad for p in model.parameters()]) == before


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(PeftcError) as caught:
        compile_plan(snapshot(base()), {"default": AdaptionPromptConfig(target_modules="attn")})
    assert [d.code for d in caught.value.diagnostics] == ["PC117", "PC117", "PC407"]
    assert [d.where.path for d in caught.value.diagnostics] == [
        "$.adapters.default.adapter_len",
        "$.adapters.default.adapter_layers",
        "$.adapters.default.target_modules",
    ]


def test_cross_attention_is_refused() -> None:
    with pytest.raises(PeftcError, match="PC401"):
        wrapped(peftc, base("gpt2", add_cross_attention=True), target_modules="crossattention")
    assert wrapped(peftc, base("gpt2", add_cross_attention=True), adapter_layers=3)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(merge: str) -> None:
    model = wrapped(peftc)
    before, y = objects_of(model), logits(model)
    with pytest.raises(PeftcError, match="PC508"):
        getattr(model, merge)()
    assert objects_of(model) == before
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("names", [["default"] * 3, ["__base__"] * 3])
def test_rows_of_their_own_are_refused(names: list[str]) -> None:
    with pytest.raises(PeftcError, match="adapts the whole call"):
        wrapped(peftc)(**batch(), adapter_names=names)


def test_it_does_not_mix_with_methods_on_layers() -> None:
    model = peftc.get_peft_model(base(), peftc.LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(PeftcError, match="ADAPTION_PROMPT"):
        model.add_adapter("other", config(peftc, 1))
    assert list(model.peft_config) == ["default"]


def test_a_plan_shows_the_wrapped_modules() -> None:
    text = render_plan(planned(default=2))
    assert "model.layers.{1..2}.self_attn  ×2  around LlamaAttention  1×4×32 + 1        258" in text
    told = render_explanation(explain(snapshot(base()), "default", config(peftc, 2), "model.layers.1.self_attn"))
    assert "is wrapped, with adaption_prompt 1×4×32 float32, adaption_gate 1 float32" in told
    assert "Wrapped: 129 trainable parameters; its own are `model.layers.1.self_attn.model.…` now." in told
    told = render_explanation(explain(snapshot(base()), "default", config(peftc, 2), "model.layers.0.self_attn"))
    assert "Not adapted: ADAPTION_PROMPT wraps `model.layers.1.self_attn`, `model.layers.2.self_attn`." in told


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        yield
