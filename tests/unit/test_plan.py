"""Plans as values: names, counts, costs, and JSON without loss."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftc.checkpoint.format import write_file
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.cost import cost_of, file_bytes, trainable_by_role
from peftc.compiler.plan.drift import differences
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.serial import plan_digest, plan_from_json, plan_from_text, plan_to_json, plan_to_text
from peftc.config.base import PeftConfig
from peftc.graph.base_ref import BaseRef
from peftc.graph.nodes import ModuleGraph
from tests.unit import plans
from tests.unit.plans import PromptConfig, SampleConfig, decoder, planned

configs = st.builds(
    SampleConfig,
    target_modules=st.sampled_from(
        [{"q_proj"}, {"q_proj", "mlp.up_proj", "lm_head"}, "all-linear", r".*(q|v)_proj", {"embed_tokens"}]
    ),
    r=st.integers(1, 8),
    alpha=st.integers(1, 5),
    rank_pattern=st.sampled_from([{}, {"q_proj": 3}, {"layers.0.*": 2, "q_proj": 3}]),
    modules_to_save=st.sampled_from([None, ["model.norm"], ["lm_head"]]),
    task_type=st.sampled_from([None, "CAUSAL_LM"]),
    inference_mode=st.booleans(),
)
graphs = st.sampled_from([decoder(), decoder(1, tied=True), decoder(2, bias=True, dtype="bfloat16")])


def two(graph: ModuleGraph, first: PeftConfig, second: PeftConfig) -> InjectionPlan:
    adapters = {"a": first, "b": second}
    return compile_plan(graph, adapters, active=["b"], registry=plans.registry())


@given(graphs, configs)
def test_json_has_no_loss(graph: ModuleGraph, config: SampleConfig) -> None:
    plan = compile_plan(graph, {"a": config}, registry=plans.registry())
    again = plan_from_text(plan_to_text(plan), registry=plans.registry())
    assert again == plan
    assert again.graph_digest == plan.graph_digest
    assert (again.base_bytes, again.counts()) == (plan.base_bytes, plan.counts())
    assert list(again.parameters()) == list(plan.parameters())
    assert plan_to_text(again) == plan_to_text(plan)


def test_json_of_prompts_biases_bases_and_several_adapters() -> None:
    prompt = compile_plan(decoder(), {"p": PromptConfig(num_virtual_tokens=3)}, registry=plans.registry())
    biased = planned(decoder(bias=True), target_modules=["q_proj"], bias="all")
    several = two(decoder(), SampleConfig(target_modules=["q_proj"]), SampleConfig(target_modules="all-linear", r=2))
    based = replace(several, base=BaseRef(distribution="some-model", file="model.gguf", dtype="float32"))
    for plan in (prompt, biased, several, based):
        assert plan_from_json(json.loads(json.dumps(plan_to_json(plan))), registry=plans.registry()) == plan


def test_the_text_is_the_same_in_every_process(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.q_proj", "mlp.up_proj")]
    texts = set()
    for seed in range(3):
        random.Random(seed).shuffle(names)
        texts.add(plan_to_text(planned(target_modules=list(names), rank_pattern={"q_proj": 2})))
    assert len(texts) == 1


def test_equal_plans_have_one_digest_whatever_objects_they_share() -> None:
    apart = decoder()
    nodes = tuple(replace(n, facts=replace(n.facts)) for n in apart.nodes)  # equal facts, no longer shared
    assert plan_digest(planned(replace(apart, nodes=nodes), target_modules=["q_proj"])) == plan_digest(
        planned(target_modules=["q_proj"])
    )


def test_a_digest_tells_every_change() -> None:
    one = planned(target_modules=["q_proj"])
    others = [
        planned(target_modules=["q_proj"], r=7),
        planned(decoder(2), target_modules=["q_proj"]),
        replace(one, active=()),
    ]
    assert len({plan_digest(plan) for plan in [one, *others]}) == 4


def test_the_text_has_one_module_a_line() -> None:
    lines = plan_to_text(planned(target_modules=["q_proj"])).splitlines()
    assert [line.strip().rstrip(",") for line in lines if "layers.1" in line] == [
        '["model.layers.1.self_attn.q_proj", 0]'
    ]


def test_counts_follow_what_is_active() -> None:
    plan = two(decoder(), SampleConfig(target_modules=["q_proj"], r=1), SampleConfig(target_modules=["v_proj"], r=2))
    first, second = (sum(p.numel for p in a.parameters()) for a in plan.adapters)
    assert (first, second) == (3 * 16, 3 * 32)
    assert plan.counts() == (second, plan.base_numel + first + second)
    frozen = planned(target_modules=["q_proj"], inference_mode=True)
    assert frozen.counts()[0] == 0


def test_tied_weights_are_counted_once() -> None:
    tied, apart = planned(decoder(tied=True), target_modules=["q_proj"]), planned(target_modules=["q_proj"])
    assert apart.base_numel - tied.base_numel == 20 * 8
    assert apart.base_bytes - tied.base_bytes == 4 * 20 * 8


def test_names_in_memory_and_on_disk() -> None:
    plan = compile_plan(
        decoder(1),
        {"x": SampleConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])},
        registry=plans.registry(),
    )
    root = "base_model.model.model.layers.0.self_attn.q_proj"
    assert [(p.name, p.disk) for p in plan.parameters()] == [
        (f"{root}.sample_A.x.weight", f"{root}.sample_A.weight"),
        (f"{root}.sample_B.x", f"{root}.sample_B"),
        ("base_model.model.lm_head.modules_to_save.x.weight", "base_model.model.lm_head.weight"),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_of_the_file_is_exact(tmp_path: Path, dtype: str) -> None:
    for config in (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": "all-linear", "modules_to_save": ["norm"], "bias": "all"},
    ):
        plan = planned(decoder(bias=True, dtype=dtype), **config)
        tensors = dict(plan.adapters[0].stored(plan.model))
        file = tmp_path / "adapter.safetensors"
        write_file(file, tensors, lambda key, t=tensors: [memoryview(bytes(t[key].nbytes))], {"format": "pt"})
        assert file_bytes(plan.adapters[0], plan.model) == file.stat().st_size


def test_adapted_embeddings_are_stored_whole() -> None:
    plan = planned(target_modules=["embed_tokens"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in dict(plan.adapters[0].stored(plan.model))


def test_memory_of_training() -> None:
    plan = planned(decoder(dtype="bfloat16"), target_modules=["q_proj"], r=4)
    cost = cost_of(plan)
    trainable = plan.counts()[0]
    assert cost.base == 2 * plan.base_numel
    assert (cost.adapters, cost.gradients, cost.optimiser) == (4 * trainable, 4 * trainable, 8 * trainable)
    assert cost.training == cost.base + 16 * trainable
    bias = cost_of(planned(decoder(bias=True), target_modules=["q_proj"], bias="all"))
    assert bias.gradients > bias.adapters  # the biases are the base's own


def test_trainable_parameters_by_role() -> None:
    plan = planned(
        decoder(bias=True), target_modules=["q_proj", "up_proj"], modules_to_save=["model.norm"], bias="all", r=1
    )
    by_role = trainable_by_role(plan)
    assert sum(by_role.values()) == plan.counts()[0]
    assert list(by_role) == ["q", "up", "saved modules", "biases"]


def test_a_plan_fits_the_model_it_was_made_for_and_one_that_differs_elsewhere() -> None:
    graph = decoder()
    plan = plan_from_text(plan_to_text(planned(graph, target_modules=["q_proj"])), registry=plans.registry())
    assert differences(plan, graph) == ()
    moved = replace(
        graph, model=replace(graph.model, name_or_path="/elsewhere"), nodes=graph.nodes[:1] + graph.nodes[:0:-1]
    )
    assert differences(plan, moved) == ()


@pytest.mark.parametrize("rule", ["order", "shape"])
def test_a_tampered_plan_never_reaches_the_compiler(rule: str) -> None:
    data: dict[str, Any] = plan_to_json(planned(target_modules=["q_proj"]))
    if rule == "order":
        data["adapters"][0]["maps"].reverse()
    else:
        data["adapters"][0]["kinds"][0]["slots"][0]["shape"] = [1, 1]
    with pytest.raises(Exception, match="changed after it was written"):
        plan_from_json(data, registry=plans.registry())
