"""What the passes decide: who is adapted with what, which parameters train, and that configs are neither changed nor shared."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftc.compiler.compile import compile_plan
from peftc.compiler.passes.order import PASSES
from peftc.compiler.passes.sites import slot_dtype
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import Kind, ModuleGraph, ModuleNode, Role
from peftc.plugin import LINEAR_KINDS, MapTuner
from peftc.tuner.slots import Slot
from tests.unit import plans
from tests.unit.plans import (
    PromptConfig,
    SampleConfig,
    SampleTuner,
    and_modules,
    decoder,
    facts,
    linear,
    paths,
    planned,
)

LAYERS = [f"model.layers.{i}" for i in range(3)]


def test_targets_come_in_graph_order_with_their_reason() -> None:
    plan = planned(target_modules=["up_proj", "layers.1.self_attn.q_proj", "q_proj"])
    found = [(site.path, site.reason) for site in plan.adapters[0].maps]
    assert found == [
        pair
        for i, block in enumerate(LAYERS)
        for pair in (
            (f"{block}.self_attn.q_proj", "layers.1.self_attn.q_proj" if i == 1 else "q_proj"),
            (f"{block}.mlp.up_proj", "up_proj"),
        )
    ]


def test_all_linear_leaves_out_the_output_embedding() -> None:
    assert "lm_head" not in paths(planned(target_modules="ALL-Linear"))
    assert len(paths(planned(target_modules="all-linear"))) == 12


def test_exclusion_by_name_and_by_pattern() -> None:
    by_name = planned(target_modules="all-linear", exclude_modules=["v_proj", "layers.0.mlp.up_proj"])
    by_pattern = planned(target_modules="all-linear", exclude_modules=r".*v_proj|.*\.0\.mlp\.up_proj")
    assert paths(by_name) == paths(by_pattern)
    assert len(paths(by_name)) == 12 - 3 - 1


def test_modules_to_save_are_spared_with_all_below() -> None:
    plan = planned(target_modules="all-linear", modules_to_save=["mlp"])
    assert [save.path for save in plan.adapters[0].saves] == [f"{block}.mlp" for block in LAYERS]
    assert all(".mlp." not in path for path in paths(plan))
    tensors = plan.adapters[0].saves[0].tensors
    assert [name for name, _ in tensors] == ["up_proj.weight", "down_proj.weight"]


def test_the_outermost_of_nested_modules_is_saved() -> None:
    plan = planned(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"])
    assert [save.path for save in plan.adapters[0].saves] == [f"{block}.mlp" for block in LAYERS]


def test_a_parameter_used_twice_in_a_saved_module_is_one_in_the_copy() -> None:
    tied = replace(decoder(1), ties=(("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"),))
    plan = planned(tied, target_modules=["q_proj"], modules_to_save=["mlp"])
    assert [name for name, _ in plan.adapters[0].saves[0].tensors] == ["up_proj.weight"]


def test_layers_filter_suffixes_and_all_linear_but_not_full_paths() -> None:
    assert paths(planned(target_modules=["q_proj"], layers_to_transform=1)) == [f"{LAYERS[1]}.self_attn.q_proj"]
    plan = planned(target_modules="all-linear", layers_to_transform=[0])
    assert len(paths(plan)) == 4
    assert plan.adapters[0].config.target_modules == set(paths(plan))  # so that it means the same when it is read again
    again = planned(target_modules=plan.adapters[0].config.target_modules, layers_to_transform=[0])
    assert paths(again) == paths(plan)


def test_layers_pattern_names_the_list() -> None:
    graph = and_modules(decoder(2), {"vision.h.1.layers.0.q_proj": linear(8, 8)})
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}
    assert paths(planned(graph, **config)) == ["model.layers.0.self_attn.q_proj", "vision.h.1.layers.0.q_proj"]


def test_patterns_change_options_where_they_match() -> None:
    plan = planned(
        target_modules=["q_proj", "up_proj"], rank_pattern={"layers.1.*": 2, "q_proj": 4}, alpha_pattern={"up_proj": 7}
    )
    found = {site.path: (site.config, site.overrides) for site in plan.adapters[0].maps}
    config, overrides = found["model.layers.1.mlp.up_proj"]
    assert isinstance(config, SampleConfig)
    assert (config.r, config.alpha, overrides) == (2, 7, (("r", 2), ("alpha", 7)))
    config, overrides = found["model.layers.0.self_attn.q_proj"]
    assert isinstance(config, SampleConfig)
    assert (config.r, overrides) == (4, (("r", 4),))


def test_defaults_come_from_the_table_and_are_saved() -> None:
    plan = planned(replace(decoder(), model=replace(decoder().model, model_type="llama")))
    assert plan.adapters[0].config.target_modules == {"q_proj", "v_proj"}
    assert {site.reason for site in plan.adapters[0].maps} == {"default q_proj", "default v_proj"}


def test_long_lists_are_saved_short() -> None:
    plan = planned(decoder(6), target_modules="all-linear")
    assert plan.adapters[0].config.target_modules == {"q_proj", "v_proj", "up_proj", "down_proj"}
    short = planned(decoder(2), target_modules="all-linear")
    assert short.adapters[0].config.target_modules == set(paths(short))


def test_configs_are_copied_and_resolved_ones_shared_by_sites() -> None:
    given_config = SampleConfig(target_modules="all-linear", rank_pattern={"q_proj": 2})
    before = given_config.model_copy(deep=True)
    plan = compile_plan(decoder(), {"default": given_config}, registry=plans.registry())
    assert given_config == before
    configs = {id(site.config) for site in plan.adapters[0].maps}
    assert len(configs) == 2
    assert id(plan.adapters[0].config) in configs
    assert id(given_config) not in configs


def test_biases_that_train() -> None:
    graph = decoder(1, bias=True)
    every = planned(graph, target_modules=["q_proj"], bias="all", modules_to_save=["down_proj"])
    names = [f"{t.path}.{t.name}" for t in every.adapters[0].trains]
    block = "model.layers.0"
    assert names == [f"{block}.self_attn.q_proj.bias", f"{block}.self_attn.v_proj.bias", f"{block}.mlp.up_proj.bias"]
    assert [t.wrapped for t in every.adapters[0].trains] == [True, False, False]
    own = planned(graph, target_modules=["q_proj"], bias="sample_only")
    assert [t.path for t in own.adapters[0].trains] == [f"{block}.self_attn.q_proj"]
    base = {p.name for p in every.parameters() if p.base}
    assert f"base_model.model.{block}.self_attn.q_proj.base_layer.bias" in base


def test_orientation_is_a_fact_about_the_layers() -> None:
    graph = and_modules(decoder(), {"c_attn": facts(Kind.CONV1D_TRANSPOSED, "Conv1D", 8, 24)})
    resolved = planned(graph, target_modules=["c_attn", "q_proj"]).adapters[0].config
    assert isinstance(resolved, SampleConfig)
    assert resolved.fan_in_fan_out


@pytest.mark.parametrize(
    ("weight", "autocast", "expected"),
    [
        ("float32", True, "float32"),
        ("float64", True, "float64"),
        ("float16", True, "float32"),
        ("bfloat16", True, "float32"),
        ("bfloat16", False, "bfloat16"),
        ("uint8", True, "float32"),
        ("float8_e4m3fn", False, "float32"),
    ],
)
def test_dtype_of_slots(weight: str, autocast: bool, expected: str) -> None:
    assert slot_dtype(weight, autocast) == expected
    plan = planned(decoder(dtype=weight), {"autocast_adapter_dtype": autocast}, target_modules=["q_proj"])
    assert {site.dtype for site in plan.adapters[0].maps} == {expected}


def test_heads_of_a_task() -> None:
    graph = and_modules(decoder(), {"score": linear(8, 2)}, output_embeddings=None)
    plan = planned(graph, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    assert plan.adapters[0].config.modules_to_save == ["score", "classifier"]  # type: ignore[attr-defined]
    assert [save.path for save in plan.adapters[0].saves] == ["score"]
    bare = planned(graph, {"task_heads": False}, target_modules="all-linear", task_type="SEQ_CLS")
    assert bare.adapters[0].saves == ()
    assert "score" not in paths(bare)


@pytest.mark.parametrize(("task", "submodules"), [("CAUSAL_LM", 1), ("SEQ_2_SEQ_LM", 2)])
def test_a_prompt_takes_its_sizes_from_the_model(task: str, submodules: int) -> None:
    config = PromptConfig(task_type=task, num_virtual_tokens=5)
    graph = and_modules(decoder(), {}, is_encoder_decoder=submodules == 2)
    plan = compile_plan(graph, {"default": config}, registry=plans.registry())
    resolved, prompt = plan.adapters[0].config, plan.adapters[0].prompt
    assert isinstance(resolved, PromptConfig)
    assert (resolved.token_dim, resolved.num_layers, resolved.num_attention_heads) == (8, 3, 2)
    assert resolved.num_transformer_submodules == submodules
    assert prompt is not None
    assert (prompt.shape, prompt.embeddings, prompt.disk) == (
        (5 * submodules, 8),
        "model.embed_tokens",
        "prompt_embeddings",
    )
    assert [p.name for p in plan.parameters()] == ["prompt_encoder.default.embedding.weight"]


def test_a_method_is_asked_once_for_each_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleTuner, "asked", 0)
    planned(decoder(40), target_modules="all-linear", rank_pattern={"layers.7.mlp.up_proj": 3})
    assert SampleTuner.asked == 3 + 1  # 8→8, 8→32, 32→8, and one of them with another rank


def test_a_choice_of_mathematics_may_depend_on_the_path() -> None:
    class Other(SampleTuner):
        def slots(self, c: SampleConfig, layer: Any) -> Any:
            yield Slot("sample_v", (layer.out_features,))

    tuners = {True: SampleTuner(), False: Other()}

    def choose(config: SampleConfig, node: ModuleNode) -> MapTuner[Any]:
        return tuners[".0." in node.path]

    plan = planned(None, {"registry": plans.registry(choose)}, target_modules=["q_proj"])
    assert [len(site.slots) for site in plan.adapters[0].maps] == [2, 1, 1]


def test_kinds_of_layer_may_have_mathematics_of_their_own() -> None:
    class Lookup(SampleTuner):
        supports = frozenset({Kind.EMBEDDING})

        def slots(self, c: SampleConfig, layer: Any) -> Any:
            yield Slot("sample_v", (layer.out_features,))

    registry = plans.registry((Lookup(), SampleTuner()))
    plan = planned(None, {"registry": registry}, target_modules=["q_proj", "embed_tokens"])
    assert {len(site.slots): site.layer.kind for site in plan.adapters[0].maps} == {
        2: Kind.LINEAR,
        1: Kind.EMBEDDING,
    }
    assert registry.get("SAMPLE").supports == LINEAR_KINDS | {Kind.EMBEDDING}
    with pytest.raises(PeftcError, match=r"conv1d_transposed.*embedding.*linear"):
        planned(None, {"registry": registry}, target_modules=["norm"])


def test_a_choice_that_raises_is_told_with_the_module() -> None:
    def choose(config: SampleConfig, node: ModuleNode) -> MapTuner[Any]:
        raise LookupError("nothing fits")

    with pytest.raises(PeftcError, match=r"`tuner_for` of SAMPLE raised LookupError: nothing fits") as caught:
        planned(None, {"registry": plans.registry(choose)}, target_modules=["q_proj"])
    assert caught.value.diagnostics[0].where.path == "model.layers.0.self_attn.q_proj"


def test_passes_do_not_change_what_they_are_given() -> None:
    from peftc.compiler.compile import begin
    from peftc.compiler.passes.draft import Options

    config = SampleConfig(
        target_modules="all-linear", exclude_modules=["v_proj"], rank_pattern={"q_proj": 2}, bias="all"
    )
    draft, context = begin(decoder(bias=True), "default", config, plans.registry(), Options())
    for step in PASSES:
        before = (draft.config.model_copy(deep=True), dict(draft.targets), dict(draft.dropped), draft.problems)
        after = step(draft, context)
        assert before == (draft.config, draft.targets, draft.dropped, draft.problems)
        draft = after


def wide(targets: int) -> ModuleGraph:
    """Blocks of experts as modules, the layout with the most targets."""
    names = [
        f"model.layers.{i}.mlp.experts.{j}.{p}_proj"
        for i in range(targets // 48)
        for j in range(16)
        for p in ("gate", "up", "down")
    ]
    layer = linear(8, 8)
    return plans.graph_of(dict.fromkeys(names, layer))


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"], r".*_proj"])
def test_four_thousand_targets_take_no_time(targets: Any) -> None:
    graph = wide(4200)
    times = []
    for _ in range(3):
        start = time.process_time()
        plan = planned(graph, target_modules=targets)
        times.append(time.process_time() - start)
    assert len(paths(plan)) == 4176
    assert min(times) < 0.25  # 50 ms and less where the machine is not shared


def test_time_is_linear_in_targets() -> None:
    def cost(graph: ModuleGraph) -> float:
        names = {node.path for node in graph.nodes if node.facts.kind in LINEAR_KINDS}
        best = 1e9
        for _ in range(3):
            start = time.process_time()
            planned(graph, target_modules=names, rank_pattern=dict.fromkeys(sorted(names), 2))
            best = min(best, time.process_time() - start)
        return best

    assert cost(wide(9600)) < 4 * 2 * cost(wide(2400))  # quadratic would be sixteen times


@given(st.sets(st.sampled_from(["q_proj", "v_proj", "up_proj", "mlp.down_proj", "lm_head"]), min_size=1), st.booleans())
def test_what_is_saved_means_the_same_when_it_is_read(names: set[str], everything: bool) -> None:
    plan = planned(decoder(6), target_modules="all-linear" if everything else names)
    again = planned(decoder(6), target_modules=plan.adapters[0].config.target_modules)  # type: ignore[attr-defined]
    assert paths(again) == paths(plan)
    assert again.adapters[0].config == plan.adapters[0].config


def test_roles_are_kept_with_the_sites() -> None:
    assert {site.role for site in planned(target_modules=["q_proj"]).adapters[0].maps} == {Role.Q}
