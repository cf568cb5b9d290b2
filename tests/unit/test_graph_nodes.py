"""The graph as data: JSON there and back, what its digest depends on, damage, groups of repeated modules, roles."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc import rules
from peftc.compiler.plan.files import read_graph
from peftc.diagnostics import PeftcError, Rule
from peftc.graph.files import graph_from_text, replace_file, write_graph
from peftc.graph.groups import grouped, ranges
from peftc.graph.nodes import Kind, LayerFacts, ModelFacts, ModuleGraph, ModuleNode, Role, block_of
from peftc.graph.roles import RoleFinder
from peftc.graph.tensors import TensorFacts


def graph(dtype: str = "bfloat16", layers: int = 2, name: str | None = "owner/model") -> ModuleGraph:
    linear = LayerFacts(Kind.LINEAR, "Linear", 4, 6, params=(("weight", TensorFacts((6, 4), dtype)),))
    conv = LayerFacts(
        Kind.CONV2D, "Conv2d", 4, 6, (3, 3), 2, (("weight", TensorFacts((6, 2, 3, 3), dtype)),), note="a note"
    )
    norm = LayerFacts(Kind.NORM, "LayerNorm", 4, 4, buffers=(("b", TensorFacts((), "int64")),))
    nodes = [ModuleNode("", LayerFacts(Kind.OTHER, "Net"))]
    for index in range(layers):
        for leaf, facts, role in (("q_proj", linear, Role.Q), ("conv", conv, None), ("norm", norm, Role.NORM)):
            nodes.append(ModuleNode(f"layers.{index}.{leaf}", facts, role, ("layers", index)))
    model = ModelFacts("Net", "net", name, "layers.0.q_proj", None, {"hidden_size": 4}, True)
    return ModuleGraph(model, tuple(nodes), (("layers.0.q_proj.weight", "layers.1.q_proj.weight"),))


def test_json_there_and_back_is_the_same_graph() -> None:
    made = graph()
    again = ModuleGraph.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    assert again.digest == made.digest
    assert len({id(node.facts) for node in again.nodes}) == 4  # facts are shared again


def test_tied_parameters_count_once() -> None:
    assert graph().numel == 24 + 2 * 108
    assert "layers.1.q_proj.weight" not in dict(graph().parameters())


@pytest.mark.parametrize(
    "other",
    [graph(dtype="float32"), graph(layers=3), replace(graph(), ties=())],
    ids=["dtype", "layers", "ties"],
)
def test_the_digest_tells_structures_apart(other: ModuleGraph) -> None:
    assert other.digest != graph().digest


def test_the_digest_does_not_depend_on_where_a_model_came_from_or_what_is_said_of_it() -> None:
    assert graph(name="elsewhere").digest == graph().digest
    told = tuple(replace(node, role=None, facts=replace(node.facts, note="x")) for node in graph().nodes)
    assert replace(graph(), nodes=told).digest == graph().digest


def test_a_file_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    write_graph(graph(), path)
    assert read_graph(path) == graph()
    assert [p.name for p in tmp_path.iterdir()] == ["graph.json"]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", rules.SYNTAX),
        (b"{", rules.SYNTAX),
        (b"[]", rules.GRAPH_INVALID),
        (b"null", rules.GRAPH_INVALID),
        (b'{"version": 99}', rules.GRAPH_INVALID),
        (b'{"version": 99, "facts": [], "nodes": []}', rules.GRAPH_INVALID),
        (b"\xff\xfe", rules.SYNTAX),
        (b"[" * 100_000, rules.TOO_LARGE),
    ],
)
def test_what_is_no_graph_is_a_diagnostic(tmp_path: Path, content: bytes, rule: Rule) -> None:
    path = tmp_path / "graph.json"
    path.write_bytes(content)
    with pytest.raises(PeftcError) as caught:
        read_graph(path)
    assert [d.code for d in caught.value.diagnostics] == [rule.code]


def test_every_mistake_of_a_graph_is_told_with_its_line(tmp_path: Path) -> None:
    data = graph().to_json()
    data["facts"][1]["in_features"] = 4.0
    del data["model"]["cls"]
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(data, indent=0))
    with pytest.raises(PeftcError) as caught:
        read_graph(path)
    told = {(d.code, d.where.path) for d in caught.value.diagnostics}
    assert told == {("PC308", "$.facts[1].in_features"), ("PC308", "$.model.cls")}
    assert all((d.where.line or 0) > 1 for d in caught.value.diagnostics)


def test_a_missing_graph_file_is_a_diagnostic(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="PC110"):
        read_graph(tmp_path / "none.json")


DATA = graph().to_json()


def _places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at] + [place for key, value in items for place in _places(value, (*at, key))]


@settings(max_examples=200, deadline=None)
@given(
    place=st.sampled_from(_places(DATA)[1:]),
    value=st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.just({}),
)
def test_damage_is_a_value_error_or_harmless(place: tuple[Any, ...], value: Any) -> None:
    data = copy.deepcopy(DATA)
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    try:
        found = graph_from_text(json.dumps(data).encode())
    except ValueError:
        return
    assert ModuleGraph.from_json(found.to_json()) == found  # of the right types throughout
    assert found.numel >= 0


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuse(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("peftc.graph.files.os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_regular_file_is_written_to() -> None:
    replace_file(Path("/dev/null"), b"gone")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.3.mlp", ("model.layers", 3)),
        ("h.0", ("h", 0)),
        ("0.weight", ("", 0)),
        ("lm_head", None),
        ("", None),
    ],
)
def test_the_block_is_the_first_number_in_the_path(path: str, block: tuple[str, int] | None) -> None:
    assert block_of(path) == block


def test_repeated_modules_are_one_line() -> None:
    tagged = [(f"model.layers.{i}.experts.{e}.w", "x") for i in (0, 1, 2, 5) for e in range(3)]
    tagged += [("model.layers.0.q", "x"), ("model.layers.1.q", "y"), ("head", "x")]
    groups = grouped(tagged)
    assert [(g.pattern, g.count, g.tag) for g in groups] == [
        ("model.layers.{0..2,5}.experts.{0..2}.w", 12, "x"),
        ("model.layers.0.q", 1, "x"),
        ("model.layers.1.q", 1, "y"),
        ("head", 1, "x"),
    ]
    assert sum(group.count for group in groups) == len(tagged)
    assert ranges([4, 2, 3, 9]) == "{2..4,9}"


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.7.self_attn.q_proj", Role.Q),
        ("model.layers.7.self_attn.k_proj", Role.K),
        ("transformer.h.0.attn.c_attn", Role.QKV),
        ("transformer.h.0.attn.c_proj", Role.O),
        ("transformer.h.0.mlp.c_proj", Role.DOWN),
        ("transformer.h.0.mlp.c_fc", Role.UP),
        ("bert.encoder.layer.0.attention.self.query", Role.Q),
        ("bert.encoder.layer.0.attention.output.dense", Role.O),
        ("bert.encoder.layer.0.intermediate.dense", Role.UP),
        ("bert.encoder.layer.0.output.dense", Role.DOWN),
        ("encoder.block.0.layer.0.SelfAttention.o", Role.O),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", Role.GATE),
        ("encoder.block.0.layer.1.DenseReluDense.wo", Role.DOWN),
        ("model.layers.3.mlp.gate", Role.ROUTER),
        ("model.layers.3.mlp.shared_expert_gate", Role.ROUTER),
        ("model.layers.3.mlp.gate_proj", Role.GATE),
        ("model.layers.3.mlp.experts", Role.EXPERT),
        ("model.layers.3.mlp.experts.5.up_proj", Role.EXPERT),
        ("model.layers.3.mlp.shared_experts.up_proj", Role.UP),
        ("model.layers.3.block_sparse_moe.router.layer", Role.ROUTER),
        ("model.vision_tower", Role.TOWER),
        ("model.visual", Role.TOWER),
        ("model.vision_tower.encoder.layers.0.self_attn.out_proj", Role.O),
        ("score", Role.HEAD),
        ("classifier.dense", Role.HEAD),
        ("model.layers.3.mamba.out_proj", None),
        ("model.layers.3.self_attn.gate_proj", None),
        ("model.layers.3.self_attn.indexer.wk", None),
        ("model.layers.3", None),
    ],
)
def test_roles_by_name(path: str, role: Role | None) -> None:
    assert RoleFinder().role_of(path, LayerFacts(Kind.LINEAR, "Linear")) is role


def test_roles_by_structure() -> None:
    finder = RoleFinder(output_embeddings="anything")
    assert finder.role_of("anything", LayerFacts(Kind.LINEAR, "Linear")) is Role.HEAD
    assert finder.role_of("x.y", LayerFacts(Kind.NORM, "LayerNorm")) is Role.NORM
    assert finder.role_of("x.y", LayerFacts(Kind.EMBEDDING, "Embedding")) is Role.EMBEDDING
    assert finder.role_of("x.y", LayerFacts(Kind.LINEAR, "Linear")) is None
