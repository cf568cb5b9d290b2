"""Default targets by role: which layers, in which part of a model, how they are written, and what the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from peftc.compiler.compile import compile_plan
from peftc.compiler.explain import explain, render_explanation
from peftc.compiler.match import matches
from peftc.compiler.passes.by_role import among, find_by_role, written
from peftc.compiler.plan.render import render_plan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import Kind, LayerFacts, ModuleGraph, Role
from peftc.graph.roles import RoleFinder
from peftc.graph.targets import TableRoles
from tests.unit import plans
from tests.unit.plans import decoder, facts, linear, planned

QUERY_AND_VALUE = TableRoles(needed=(Role.Q, Role.V))


def model(modules: Mapping[str, LayerFacts], **about: Any) -> ModuleGraph:
    """A graph of these modules with the roles that their names tell."""
    graph = plans.graph_of(modules, **about)
    finder = RoleFinder(graph.model.output_embeddings)
    return replace(graph, nodes=tuple(replace(n, role=finder.role_of(n.path, n.facts)) for n in graph.nodes))


def attention(
    prefix: str, layers: int = 2, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
) -> dict[str, LayerFacts]:
    return {f"{prefix}layers.{i}.self_attn.{name}": linear(8, 8) for i in range(layers) for name in names}


EMBEDDING = facts(Kind.EMBEDDING, "Embedding", 20, 8)
SEEING = model(
    {"language_model.embed_tokens": EMBEDDING, **attention("language_model."), **attention("vision_tower.")},
    input_embeddings="language_model.embed_tokens",
)


def chosen(graph: ModuleGraph, roles: TableRoles = QUERY_AND_VALUE) -> set[str]:
    found = find_by_role(graph, roles)
    assert found is not None
    return set(found.paths)


def meant(targets: list[str] | str, graph: ModuleGraph) -> set[str]:
    return {node.path for node in graph.nodes if node.path and matches(targets, node.path)}


# which layers ----------------------------------------------------------------------------------------------------------


def test_a_type_without_a_default_gets_query_and_value_and_the_plan_says_so() -> None:
    plan = planned()
    (adapter,) = plan.adapters
    assert adapter.config.target_modules == {"q_proj", "v_proj"}
    assert {site.reason for site in adapter.maps} == {"by role q", "by role v"}
    assert adapter.notes == (
        "SAMPLE has no default `target_modules` for model type `decoder`; by role: q (`q_proj`), v (`v_proj`)",
    )
    assert adapter.notes[0] in render_plan(plan).replace("\n", " ")
    assert plan_from_json(plan_to_json(plan), registry=plans.registry()).adapters == plan.adapters


def test_every_module_is_told_where_its_targets_come_from() -> None:
    text = render_explanation(explain(decoder(), "default", plans.SampleConfig(), "lm_head", plans.registry()))
    assert "SAMPLE has no default `target_modules` for model type `decoder`; by role: q" in text


def test_what_a_config_or_a_table_says_comes_first() -> None:
    given = planned(target_modules=["up_proj"])
    known = planned(replace(decoder(), model=replace(decoder().model, model_type="llama")))
    assert given.adapters[0].config.target_modules == {"up_proj"}
    assert {site.reason for site in known.adapters[0].maps} == {"default q_proj", "default v_proj"}
    assert given.adapters[0].notes == known.adapters[0].notes == ()


def test_a_layer_that_makes_several_at_once_counts_for_each() -> None:
    graph = model(attention("model.", names=("query_key_value", "dense")))
    assert chosen(graph) == {f"model.layers.{i}.self_attn.query_key_value" for i in (0, 1)}


def test_containers_with_a_name_of_a_role_are_no_layers() -> None:
    graph = model({**attention("model."), "model.layers.0.other.q_proj.linear": linear(8, 8)})
    assert "model.layers.0.other.q_proj" not in chosen(graph)
    assert "model.layers.0.other.q_proj.linear" in chosen(graph)


@pytest.mark.parametrize("missing", ["q_proj", "v_proj"])
def test_without_one_of_the_roles_there_is_no_default(missing: str) -> None:
    names = {"q_proj", "k_proj", "v_proj"} - {missing}
    graph = model(attention("model.", names=tuple(names)))
    with pytest.raises(PeftcError, match="PC406"):
        planned(graph)


def test_wanted_roles_may_have_no_layer() -> None:
    graph = model(attention("model."))
    roles = TableRoles(needed=(Role.V,), wanted=(Role.DOWN,))
    assert chosen(graph, roles) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}


def test_norms_are_those_of_blocks() -> None:
    norm = facts(Kind.NORM, "RMSNorm", 8)
    counting = replace(norm, cls="BatchNorm1d", buffers=(("running_mean", norm.params["weight"]),))
    graph = model(
        {
            **attention("model."),
            "model.layers.0.self_attn.q_norm": norm,
            "model.layers.0.input_layernorm": norm,
            "model.layers.0.conv.norm": counting,
            "model.layers.0.plain_norm": replace(norm, params=()),
            "model.norm": norm,
        }
    )
    assert chosen(graph, TableRoles(needed=(Role.NORM,))) == {"model.layers.0.input_layernorm", "model.norm"}


# which part ------------------------------------------------------------------------------------------------------------


def test_beside_a_tower_the_language_model_alone_is_adapted_and_the_plan_says_which() -> None:
    plan = planned(SEEING)
    (adapter,) = plan.adapters
    assert adapter.config.target_modules == r"(.*\.)?language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
    assert {site.path.split(".")[0] for site in adapter.maps} == {"language_model"}
    assert adapter.notes[0].endswith("v (`v_proj`), in `language_model` alone")
    assert plans.codes(plan) == []  # nobody chose the tower, so nobody is warned of it


@pytest.mark.parametrize("wanted", [[1], [0, 1]], ids=["some", "all"])
def test_layers_to_transform_filter_targets_by_role(wanted: list[int]) -> None:
    parts = {"model.language_model.embed_tokens": EMBEDDING}
    parts |= {**attention("model.language_model."), **attention("model.vision_tower.")}
    plan = planned(model(parts, input_embeddings="model.language_model.embed_tokens"), layers_to_transform=wanted)
    layers = [f"model.language_model.layers.{i}.self_attn" for i in wanted]
    assert plans.paths(plan) == [f"{layer}.{name}" for layer in layers for name in ("q_proj", "v_proj")]
    assert isinstance(plan.adapters[0].config.target_modules, set)  # the reference refuses a pattern beside the filter
    assert plans.codes(plan) == []


def test_what_no_list_could_mean_beside_layers_to_transform_is_refused() -> None:
    graph = model(
        {"embed_tokens": EMBEDDING, **attention(""), **attention("vision_tower.")}, input_embeddings="embed_tokens"
    )
    assert planned(graph).adapters[0].config.target_modules.startswith(r"layers\.\d+")
    with pytest.raises(PeftcError, match="PC406"):
        planned(graph, layers_to_transform=[1])


def test_a_language_model_without_the_roles_is_not_replaced_by_its_tower() -> None:
    graph = model(
        {"language_model.embed_tokens": EMBEDDING, "language_model.mixer": linear(8, 8), **attention("vision_tower.")},
        input_embeddings="language_model.embed_tokens",
    )
    with pytest.raises(PeftcError, match="PC406"):
        planned(graph)


def test_an_encoder_and_decoder_are_all_but_towers_and_connectors() -> None:
    parts = ("encoder.text_model.", "decoder.", "encoder.vision_tower.", "qformer.")
    modules = {"encoder.text_model.embed_tokens": EMBEDDING}
    for part in parts:
        modules |= attention(part)
    graph = model(modules, input_embeddings="encoder.text_model.embed_tokens", is_encoder_decoder=True)
    found = find_by_role(graph, QUERY_AND_VALUE)
    assert found is not None
    assert {path.split(".layers")[0] for path in found.paths} == {"encoder.text_model", "decoder"}
    assert found.place == ", outside of `encoder.vision_tower`, `qformer`"


def test_of_two_encoders_without_a_language_model_the_one_of_text_is_adapted() -> None:
    graph = model({**attention("text_model."), **attention("vision_model.")})
    assert {path.split(".")[0] for path in chosen(graph)} == {"text_model"}


def test_where_there_is_only_a_tower_it_is_adapted() -> None:
    graph = model(
        {"vision_model.patch": linear(8, 8), **attention("vision_model.")}, input_embeddings="vision_model.patch"
    )
    assert len(chosen(graph)) == 4


# how they are written --------------------------------------------------------------------------------------------------


def test_names_that_mean_something_else_as_well_are_lengthened() -> None:
    graph = model(
        {
            **attention("model."),
            **{f"model.layers.{i}.other.q_proj": facts(Kind.CONV1D, "Conv1d", 8, 8) for i in (0, 1)},
        }
    )
    targets = written(chosen(graph), graph)
    assert targets == ["self_attn.q_proj", "v_proj"]
    assert meant(targets, graph) == chosen(graph)


@pytest.mark.parametrize(
    ("paths", "others", "expected"),
    [
        (["a.0.q", "a.1.q"], ["b.0.q"], r"(.*\.)?a\.\d+\.q"),
        (["norm", "a.0.norm2"], ["a.0.norm"], r"norm|(.*\.)?norm2"),
        (["a.0.q"], ["a.1.q"], ["0.q"]),
        (["a.0.q", "a.0.q.inner"], [], ["inner", "q"]),
        ([], ["a.q"], []),
    ],
    ids=["by number", "at the root", "not all of a kind", "one in another", "none"],
)
def test_targets_mean_exactly_the_modules(paths: list[str], others: list[str], expected: list[str] | str) -> None:
    graph = plans.graph_of({path: linear(8, 8) for path in (*paths, *others)})
    assert written(paths, graph) == expected
    assert meant(expected, graph) == set(paths)


def test_of_chosen_entries_those_are_taken_that_mean_these_modules_alone() -> None:
    graph = plans.graph_of({path: linear(8, 8) for path in ("a.0.out.dense", "a.0.dense", "a.0.down")})
    assert among(["a.0.down"], ["down", "dense"], graph) == ["down"]
    mixed = among(["a.0.out.dense"], ["down", "dense"], graph)
    assert mixed == r"(.*\.)?out\.dense"
    assert among(["a.0.down"], ["dense"], graph) == []


def test_a_model_without_a_type_is_named_by_its_class() -> None:
    graph = replace(decoder(), model=replace(decoder().model, model_type=None))
    plan = compile_plan(graph, {"default": plans.SampleConfig()}, registry=plans.registry())
    assert "for class `Decoder`; by role" in plan.adapters[0].notes[0]
