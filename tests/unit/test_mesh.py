"""What each process of a mesh holds: by hand on small graphs, and every way to write a mesh wrongly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from peftc import rules
from peftc.cli.main import main
from peftc.compiler.plan import mesh as meshes
from peftc.compiler.plan.cost import cost_of
from peftc.compiler.plan.mesh import Mesh, read_mesh, share_of
from peftc.compiler.plan.render import render_share
from peftc.diagnostics import PeftcError
from peftc.graph.files import write_graph
from peftc.graph.nodes import ModuleGraph, Packed
from tests.defects import put_defect
from tests.unit.chosen import plain_method
from tests.unit.plans import decoder, planned

SPLITS = (
    ("lm_head", "colwise_gather_output"),
    ("model.embed_tokens", "embedding_rowwise"),
    ("model.layers.*.mlp.down_proj", "rowwise"),
    ("model.layers.*.mlp.up_proj", "colwise"),
    ("model.layers.*.self_attn.q_proj.weight", "packed_colwise"),
)


def splitting(**options: object) -> ModuleGraph:
    return replace(decoder(1, bias=True, **options), splits=SPLITS)  # type: ignore[arg-type]


def by_hand(tp: int, fsdp: int) -> int:
    """Bytes of `splitting()`: width 8, 32 inside, a vocabulary of 20."""

    def up(number: int, parts: int) -> int:
        return -(-number // parts)

    sizes = [up(20, tp) * 8, up(8, tp) * 8, 8]  # embedding, q and its bias, which the plan does not name
    sizes += [8 * 8, 8]  # v
    sizes += [up(32, tp) * 8, up(32, tp), 8 * up(32, tp), 8]  # up and its bias, down, whose bias is whole
    sizes += [8, 8, up(20, tp) * 8]  # norms, head
    return sum(up(size, fsdp) for size in sizes) * 4


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("fsdp", [1, 2, 5])
def test_the_base_is_split_as_the_models_plan_says(tp: int, fsdp: int) -> None:
    plan = planned(splitting(), target_modules=["q_proj"])
    share = share_of(plan, Mesh(fsdp=fsdp, tp=tp, dp=2))
    whole = cost_of(plan)
    assert share.cost.base == by_hand(tp, fsdp)
    assert (share.cost.adapters, share.cost.gradients, share.cost.optimiser) == tuple(
        -(-number // fsdp) for number in (whole.adapters, whole.gradients, whole.optimiser)
    )


def test_one_process_has_all() -> None:
    plan = planned(splitting(), target_modules=["q_proj"])
    assert share_of(plan, Mesh()).cost == share_of(plan, Mesh(dp=4)).cost == cost_of(plan)
    assert share_of(plan, Mesh()).assumed == ()


def test_the_split_of_a_tied_weight_is_that_of_its_first_name() -> None:
    plan = planned(splitting(tied=True), target_modules=["q_proj"])
    assert share_of(plan, Mesh(tp=2)).cost.base == by_hand(2, 1) - 4 * 20 * 8 // 2


def test_what_holds_a_packed_weight_is_split_like_one() -> None:
    graph = splitting()
    packed = Packed("some", 8, 32, "float32", 80)
    nodes = [
        replace(node, facts=replace(node.facts, packed=packed)) if node.name == "up_proj" else node
        for node in graph.nodes
    ]
    plan = planned(replace(graph, nodes=tuple(nodes)), target_modules=["q_proj"])
    assert share_of(plan, Mesh()).cost.base == plan.base_bytes
    assert share_of(plan, Mesh(tp=2, fsdp=2)).cost.base == by_hand(2, 2) - 4 * 32 * 8 // 4 + 80 // 4


def test_a_model_without_a_plan_is_whole_along_tp_and_that_is_said() -> None:
    plan = planned(decoder(1), target_modules=["q_proj"])
    share = share_of(plan, Mesh(tp=2))
    assert share.cost == cost_of(plan)
    assert "no plan for tensor parallelism" in render_share(share)
    assert "no plan" not in render_share(share_of(planned(splitting(), target_modules=["q_proj"]), Mesh(tp=2)))


def test_splits_are_kept_with_the_graph_and_decide_nothing_about_a_plan() -> None:
    graph = splitting()
    data = graph.to_json()
    assert ModuleGraph.from_json(data).splits == SPLITS
    assert graph.digest == replace(graph, splits=()).digest
    old = {key: value for key, value in data.items() if key != "splits"} | {"version": 2}
    assert ModuleGraph.from_json(old).splits == ()


WRONG = {
    "unknown": ("fdsp=8", "no axis `fdsp`", "Did you mean `fsdp`"),
    "no number": ("fsdp", "`fsdp=`", "`fsdp=8,tp=2`"),
    "a word": ("tp=two", "`tp=two`", "`fsdp=8,tp=2`"),
    "zero": ("tp=0", "`tp=0`", "`fsdp=8,tp=2`"),
    "negative": ("tp=-2", "`tp=-2`", "`fsdp=8,tp=2`"),
    "a fraction": ("tp=1.5", "`tp=1.5`", "`fsdp=8,tp=2`"),
    "other digits": ("tp=²", "`tp=²`", "`fsdp=8,tp=2`"),
    "twice": ("tp=2,tp=2", "`tp` is given twice", "each once"),
    "nothing": ("", "an empty part", "`fsdp=8,tp=2`"),
    "a comma too many": ("tp=2,", "an empty part", "`fsdp=8,tp=2`"),
    "a number without end": ("tp=" + "9" * 5000, "from 1 to 1,000,000", "`fsdp=8,tp=2`"),
    "too many": ("tp=1000,fsdp=1001", "1,001,000 processes", "`fsdp=8,tp=2`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mesh_is_refused_by_what_is_wrong_with_it(name: str) -> None:
    text, what, fix = WRONG[name]
    with pytest.raises(PeftcError) as caught:
        read_mesh(text)
    (found,) = caught.value.diagnostics
    assert (found.code, found.where.path) == (rules.MESH_INVALID.code, "--mesh")
    assert what in found.what
    assert fix in found.fix


def test_all_that_is_wrong_with_a_mesh_is_told_at_once() -> None:
    with pytest.raises(PeftcError) as caught:
        read_mesh("pp=2,fsdp=x,tp=2,tp=4")
    assert len(caught.value.diagnostics) == 3


@pytest.mark.parametrize(
    ("text", "line", "without"),
    [
        ("pp=2", "if axis not in AXES:", "if False:"),
        ("tp=2,tp=3", "if axis in seen:", "if False:"),
        ("tp=1000,fsdp=1001", "math.prod(found.values()) > MAX_RANKS", "False"),
    ],
)
def test_checks_of_a_mesh_are_needed(text: str, line: str, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, meshes, line, without)
    with pytest.raises((AssertionError, TypeError)), pytest.raises(PeftcError):
        meshes.read_mesh(text)
        raise AssertionError


def spec(folder: Path) -> list[str]:
    write_graph(splitting(), folder / "graph.json")
    options = {"peft_type": plain_method().peft_type, "target_modules": ["q_proj"]}
    text = {"version": 1, "base": {"model": "some/decoder"}, "adapters": {"default": options}}
    (folder / "spec.yaml").write_text(json.dumps(text), encoding="utf-8")
    return ["plan", str(folder / "spec.yaml"), "--graph", str(folder / "graph.json")]


def test_the_command_prints_each_processs_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = spec(tmp_path)
    assert main([*words, "--mesh", "tp=2,fsdp=5"]) == 0
    shown = capsys.readouterr().out
    assert "Mesh fsdp=5,tp=2  10 processes, each with at most" in shown
    assert main([*words, "--mesh", "tp=2,fsdp=5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mesh"] == {"dp": 1, "fsdp": 5, "tp": 2, "ranks": 10}
    parts = ("base", "adapters", "gradients", "optimiser", "originals")
    assert told["bytes_each"]["base"] == by_hand(2, 5)
    assert told["bytes_each"]["training"] == sum(told["bytes_each"][part] for part in parts)
    assert main([*words, "--mesh", "tp=x", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["diagnostics"][0]["code"] == rules.MESH_INVALID.code


def test_a_mesh_is_no_explanation(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*spec(tmp_path), "--mesh", "tp=2", "--explain", "lm_head"])
    assert caught.value.code == 2
