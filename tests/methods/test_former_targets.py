"""Targets by the names that layers had before transformers 5 fused them: what is trained, beside the reference live."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc
from peftc.compiler.compile import compile_plan
from peftc.compiler.explain import explain, render_explanation
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.render import render_plan
from peftc.compiler.plan.serial import plan_from_text, plan_to_text
from peftc.config.mixins import TargetsMixin
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import EXPERT_KINDS, LINEAR_KINDS
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from tests.e2e.pairs import moved
from tests.methods.mixtures import MIXTURES, logits

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = "all-linear"
PATTERN = r".*\.(q|k|v|o|gate|up|down)_proj"
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
WIDE = ["w1", "w2", "w3"]

#: family -> targets -> trained numbers where the reference trains others, or nothing; None: as the reference.
CASES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"all": ALL, "wide": WIDE, "halves": ["w1", "w3"], "mixed": ["q_proj", "w2", "gate"], "gate": ["gate"]},
    "qwen2_moe": {"all": ALL, "pattern": PATTERN, "gate": ["gate"]},
    "qwen3_moe": {"all": ALL, "pattern": PATTERN, "names": FEED_FORWARD, "mixed": ["v_proj", "down_proj", "gate"]},
    "deepseek_v2": {"all": ALL, "names": FEED_FORWARD},
    "deepseek_v3": {"all": ALL, "pattern": PATTERN, "gate": ["gate"]},
    "olmoe": {"all": ALL, "names": FEED_FORWARD},
    "glm4_moe": {"all": ALL, "pattern": PATTERN},
    "phimoe": {"all": ALL, "wide": WIDE, "gate": ["gate"], "router": ["router"]},
    "gpt_oss": {"all": ALL, "router": ["router"]},
    "llama4": {"all": ALL, "router": ["router"]},
    "minimax": {"all": ALL, "wide": WIDE, "mixed": ["q_proj", "w2", "gate"]},
}
EACH = [(family, kind) for family, kinds in CASES.items() for kind in kinds]
#: Beside the routed experts: what the reference loses where it rewrites, and what it does not know at all.
LOST = re.compile(
    r"\.(shared_experts?|mlp|feed_forward)\.(gate_proj|up_proj|down_proj)\.|\.(experts|gate|router)\.lora"
)
LOST_OR_UNKNOWN = re.compile(rf"{LOST.pattern}|\.experts\.base_layer\.lora")


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def config_for(targets: Any, **options: Any) -> peftc.PeftConfig:
    return peftc.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **options)


def planned(family: str, config: peftc.PeftConfig) -> InjectionPlan:
    return compile_plan(snapshot(MIXTURES[family]()), {"default": config})


def adapted(family: str, config: peftc.PeftConfig) -> peftc.PeftModel:
    model = peftc.get_peft_model(MIXTURES[family](), config).eval()
    moved(model, "default", 3)
    return model


@pytest.mark.parametrize(("family", "kind"), EACH)
def test_the_plan_is_the_model_and_it_merges_and_rests(family: str, kind: str) -> None:
    config = config_for(CASES[family][kind])
    plan, base = planned(family, config), logits(MIXTURES[family]())
    model = adapted(family, config)
    assert {p.name: p.shape for p in plan.parameters() if p.trainable} == shapes(model)
    changed = logits(model)
    assert not torch.allclose(changed, base, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), changed, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), changed, atol=0, rtol=0)
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize(("family", "kind"), EACH)
def test_what_is_trained_is_what_the_reference_trains_or_more(family: str, kind: str) -> None:
    targets = CASES[family][kind]
    ours = shapes(peftc.get_peft_model(MIXTURES[family](), config_for(targets)))
    try:
        theirs = shapes(peft.get_peft_model(MIXTURES[family](), peft.LoraConfig(r=2, target_modules=targets)))
    except (ValueError, AttributeError):  # it finds nothing, or takes a router for a linear layer
        theirs = {}
    assert theirs.items() <= ours.items()
    more = [name for name in ours if name not in theirs]
    assert all(LOST_OR_UNKNOWN.search(name) for name in more) or not theirs
    if family in ("mixtral", "qwen3_moe", "olmoe", "minimax"):
        assert not more


@pytest.mark.parametrize("targets", [ALL, WIDE, ["gate"], ["q_proj", "w2", "gate"], ["w1", "w3"]], ids=str)
def test_folders_load_both_ways_with_equal_outputs(targets: Any, tmp_path: Path) -> None:
    ours = adapted("mixtral", config_for(targets))
    ours.save_pretrained(str(tmp_path / "ours"))
    there = peft.PeftModel.from_pretrained(MIXTURES["mixtral"](), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(there), logits(ours), atol=1e-5, rtol=1e-4)
    theirs = peft.get_peft_model(
        MIXTURES["mixtral"](), peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets)
    ).eval()
    moved(theirs, "default", 4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    here = peftc.PeftModel.from_pretrained(MIXTURES["mixtral"](), str(tmp_path / "theirs")).eval()
    torch.testing.assert_close(logits(here), logits(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_a_folder_with_shared_experts_is_the_same_when_loaded_again(family: str, tmp_path: Path) -> None:
    ours = adapted(family, config_for(FEED_FORWARD, rank_pattern={"gate_proj": 3, "up_proj": 3}))
    ours.save_pretrained(str(tmp_path))
    again = peftc.PeftModel.from_pretrained(MIXTURES[family](), str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(ours))
    assert again.peft_config["default"].rank_pattern == ours.peft_config["default"].rank_pattern


# ranks, scales, and what takes targets away ------------------------------------------------------------------------------

ROOT = "model.layers.0.mlp"


def site(plan: InjectionPlan, path: str, parameter: str) -> Any:
    return next(s for s in plan.adapters[0].maps if s.path == path and s.parameter == parameter)


@pytest.mark.parametrize(
    ("options", "up", "down"),
    [
        ({}, (4, 12), (2, 6)),
        ({"rank_pattern": {"w1": 3, "w3": 3}}, (6, 12), (2, 6)),
        ({"rank_pattern": {"w2": 5}}, (4, 12), (5, 6)),
        ({"rank_pattern": {"gate_up_proj": 7}}, (7, 12), (2, 6)),
        ({"alpha_pattern": {"w1": 9, "w3": 9}}, (4, 18), (2, 6)),
        ({"rank_pattern": {"w1": 1, "w3": 2}, "alpha_pattern": {"w1": 3}}, (3, 9), (2, 6)),
        ({"use_rslora": True}, (4, 6 * 2**0.5), (2, 6)),
    ],
    ids=str,
)
def test_ranks_and_scales_are_those_of_the_layers(options: Any, up: Any, down: Any) -> None:
    plan = planned("mixtral", config_for(WIDE, **options))
    for parameter, wanted in (("gate_up_proj", up), ("down_proj", down)):
        config = site(plan, f"{ROOT}.experts", parameter).config
        assert (config.r, config.lora_alpha) == (wanted[0], pytest.approx(wanted[1]))
    assert not plan.warnings


def test_a_rank_of_one_layer_is_its_own() -> None:
    plan = planned("mixtral", config_for(WIDE, rank_pattern={"layers.1.block_sparse_moe.experts.\\d+.w2": 5}))
    assert site(plan, "model.layers.1.mlp.experts", "down_proj").config.r == 5
    assert site(plan, f"{ROOT}.experts", "down_proj").config.r == 2


def test_a_router_has_the_rank_of_its_layer() -> None:
    assert (
        site(planned("mixtral", config_for(["gate"], rank_pattern={"gate": 3})), f"{ROOT}.gate", "weight").config.r == 3
    )


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"exclude_modules": ["gate"]}, ["gate_up_proj", "down_proj"]),
        ({"exclude_modules": ["experts"]}, ["weight"]),
        ({"exclude_modules": ["w2"]}, ["gate_up_proj", "weight"]),
        ({"exclude_modules": ["w1", "w3"]}, ["down_proj", "weight"]),
        ({"exclude_modules": r".*block_sparse_moe\.experts.*"}, ["weight"]),
        ({"modules_to_save": ["gate"]}, ["gate_up_proj", "down_proj"]),
    ],
    ids=str,
)
def test_exclusions_go_by_either_name(options: Any, left: set[str]) -> None:
    plan = planned("mixtral", config_for([*WIDE, "gate", "q_proj"], **options))
    assert {s.parameter for s in plan.adapters[0].maps if s.parameter} == set(left)


def test_layers_are_filtered_as_modules_are() -> None:
    plan = planned("mixtral", config_for([*WIDE, "gate"], layers_to_transform=[1]))
    assert {s.path for s in plan.adapters[0].maps} == {"model.layers.1.mlp.experts", "model.layers.1.mlp.gate"}
    assert all("1." in name for name in plan.adapters[0].config.target_parameters)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["w1"]}, "`w3`"),
        ({"target_modules": ["experts.0.w2"]}, "some of the experts"),
        ({"target_modules": r".*experts\.[01]\.w[123]"}, "some of the experts"),
        ({"target_modules": WIDE, "exclude_modules": ["w3"]}, "`w1`"),
        ({"target_modules": WIDE, "alpha_pattern": {"w1": 3}}, "scales"),
    ],
    ids=str,
)
def test_a_part_of_what_is_one_tensor_is_refused(options: Any, named: str) -> None:
    with pytest.raises(PeftcError, match="PC447") as caught:
        planned("mixtral", peftc.LoraConfig(r=2, lora_alpha=6, **options))
    assert named in str(caught.value)


def test_parameters_that_are_named_decide_which_experts_all_linear_leaves() -> None:
    plan = planned("gpt_oss", config_for(ALL, target_parameters=["0.mlp.experts.down_proj"]))
    assert [s.path for s in plan.adapters[0].maps if s.parameter == "down_proj"] == [f"{ROOT}.experts"]


# what is said of it ------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_was_rewritten() -> None:
    plan = planned("mixtral", config_for([*WIDE, "gate"]))
    text = " ".join(render_plan(plan).split())
    assert "w1, w3 → gate_up_proj with r 2 → 4, lora_alpha 6 → 12" in text
    assert "gate → gate.weight" in text
    assert plan_from_text(plan_to_text(plan)).adapters[0].rewrites == plan.adapters[0].rewrites


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "model.layers.0.block_sparse_moe.experts.1.w3",
            "part 2 of 2 of `model.layers.0.mlp.experts.gate_up_proj`, expert 1",
        ),
        ("model.layers.0.mlp.experts", "rewritten: w2 → down_proj"),
        ("model.layers.0.block_sparse_moe.gate", "now `model.layers.0.mlp.gate.weight`"),
    ],
)
def test_a_module_is_explained_under_either_name(path: str, said: str) -> None:
    told = render_explanation(explain(snapshot(MIXTURES["mixtral"]()), "default", config_for([*WIDE, "gate"]), path))
    assert said in told
    assert "Adapted: " in told


def test_a_slip_in_a_former_name_is_met_with_the_right_one() -> None:
    with pytest.raises(PeftcError, match="`block_sparse_moe"):
        planned("mixtral", config_for(["block_sparse_mo.experts.0.w2"]))


@pytest.mark.parametrize("targets", [ALL, PATTERN])
def test_routers_that_are_reached_by_accident_are_told(targets: str) -> None:
    warned = {warning.code for warning in planned("qwen3_moe", config_for(targets)).warnings}
    assert ("PC414" in warned) == (targets == ALL)
    assert "PC414" not in {w.code for w in planned("mixtral", config_for(["gate"])).warnings}


# every method ------------------------------------------------------------------------------------------------------------


def _methods(experts: bool) -> list[str]:
    registry = default_registry()
    found = []
    for name in registry.names:
        method = registry.get(name)
        if issubclass(method.config, TargetsMixin) and not LINEAR_KINDS.isdisjoint(method.supports):
            reachable = "target_parameters" in method.config.model_fields
            if (reachable and not EXPERT_KINDS.isdisjoint(method.supports)) == experts and method.adapts_layers:
                found.append(name)
    return found


def options_of(name: str) -> dict[str, Any]:
    return dict(next(iter(default_registry().get(name).examples), {}))


@pytest.mark.parametrize("name", _methods(experts=True))
def test_every_method_that_adapts_experts_finds_them_by_name(name: str) -> None:
    given = {**options_of(name), "target_modules": [*WIDE, "q_proj"]}
    config = default_registry().get(name).config(**given)
    plan = planned("mixtral", config)
    assert {s.parameter for s in plan.adapters[0].maps} == {"", "gate_up_proj", "down_proj"}
    model, base = adapted("mixtral", config), logits(MIXTURES["mixtral"]())
    assert {p.name: p.shape for p in plan.parameters() if p.trainable} == shapes(model)
    changed = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), changed, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", _methods(experts=False)[:2])
def test_a_method_that_adapts_no_experts_says_so(name: str) -> None:
    config = default_registry().get(name).config(**{**options_of(name), "target_modules": WIDE})
    with pytest.raises(PeftcError, match="adapts no parameters"):
        planned("mixtral", config)
