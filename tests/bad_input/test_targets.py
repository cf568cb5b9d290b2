"""Targets, patterns and options that do not fit the model: each gets its diagnostic, all at once, with the nearest name.

Every case has a mutation, a small defect put into the compiler, under which the diagnostic does not come: so the case
can fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from peftc import rules
from peftc.compiler import compile as compiler
from peftc.compiler import explain, match
from peftc.compiler.passes import checks, defaults, former, prompts, select, sites
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import PeftConfig
from peftc.diagnostics import NoMatchingPeftModuleError, PeftcError, PeftError
from peftc.graph.former import FormerLayers
from peftc.graph.nodes import EXPERT_KINDS, Kind, Packed
from peftc.registry import boundary
from peftc.registry.manager import default_registry
from tests.bad_input.told import Case, examine, warned
from tests.defects import put_defect
from tests.unit import plans
from tests.unit.plans import PromptConfig, SampleConfig, and_modules, container, decoder, experts, facts, linear

STRICT = {"strict": True}


def plan(graph: Any = None, options: Any = None, **config: Any) -> Callable[[], InjectionPlan]:
    return lambda: plans.planned(graph, options, **{"target_modules": ["q_proj"], **config})


def prompt(graph: Any = None, **config: Any) -> Callable[[], InjectionPlan]:
    adapters = {"default": PromptConfig(**{"num_virtual_tokens": 3, **config})}
    return lambda: compiler.compile_plan(graph or decoder(), adapters, registry=plans.registry())


def together(*configs: Any) -> Callable[[], Any]:
    adapters = {f"adapter{i}": config for i, config in enumerate(configs)}
    return lambda: compiler.compile_plan(decoder(), adapters, registry=plans.registry())


def sample(**config: Any) -> SampleConfig:
    return SampleConfig(**{"target_modules": ["q_proj"], **config})


def fused(*targets: str) -> Callable[[], InjectionPlan]:
    """An adapter of a method that adapts experts, on a model that has them fused."""

    def act() -> InjectionPlan:
        known = default_registry()
        able = (known.get(name) for name in known.names if not EXPERT_KINDS.isdisjoint(known.get(name).supports))
        method = next(method for method in able if "target_parameters" in method.config.model_fields)
        return compiler.compile_plan(FUSED, {"default": method.config(target_modules=set(targets))})

    return act


HYBRID = and_modules(decoder(2), {"model.layers.2.mixer.in_proj": linear(8, 8)})
MAMBA = and_modules(decoder(), {"model.layers.0.mixer.out_proj": linear(8, 8)}, model_type="mamba")
VISION = and_modules(decoder(), {"vision.layers.0.q_proj": linear(8, 8)})
MIXED = and_modules(decoder(), experts())
CLOSED = and_modules(
    decoder(),
    {
        "model.layers.1.self_attn.q_proj": replace(
            linear(8, 8), packed=Packed("sealing", 8, 8, "float32", 64, passes_gradients=False)
        )
    },
)
NO_ROLES = plans.graph_of({"layers.0.mixer": linear(8, 8)})
FUSED = replace(
    MIXED,
    former=(
        FormerLayers("model.layers.*.mlp.experts", "up", ("layers.*.moe.{expert}.w1", "layers.*.moe.{expert}.w3")),
    ),
)
CLASSIFIER = and_modules(decoder(), {"classifier": linear(8, 2)})

CASES: dict[str, Case] = {
    "nothing matches": Case(
        rules.NO_MATCH, plan(target_modules=["q_porj"]), ("`q_porj`", "Did you mean `q_proj`", "$.adapters.default.target_modules"),
        (select, "    if not draft.targets and not (draft.parameters and not draft.dropped.keys() - draft.former.keys()):\n        draft = draft.told(_no_match", "    if False:\n        draft = draft.told(_no_match"),
    ),
    "empty list": Case(
        rules.NO_MATCH, plan(target_modules=[]), ("The empty list", "`q_proj`"),
        (select, "    if not draft.targets and not (draft.parameters and not draft.dropped.keys() - draft.former.keys()):\n        draft = draft.told(_no_match", "    if draft.source == '':\n        draft = draft.told(_no_match"),
    ),
    "a name as a string": Case(
        rules.NO_MATCH, plan(target_modules="q_proj"), ("regular expression over the full path", "[q_proj]"),
        (select, "    if any(name.find(node.path) for node in context.graph.nodes):\n        fix = f\"A string", "    if False:\n        fix = f\"A string"),
    ),
    "a pattern that matches nothing": Case(
        rules.NO_MATCH, plan(target_modules=r"decoder\..*"), ("It has to match the full path, as `model.embed_tokens`",),
        (select, "It has to match the full path", "No"),
    ),
    "everything excluded": Case(
        rules.NO_MATCH, plan(exclude_modules=["q_proj"]), ("All 3 targets", "excluded by `q_proj`"),
        (select, "    if draft.dropped:\n        reasons", "    if False:\n        reasons"),
    ),
    "all-linear without linear layers": Case(
        rules.NO_MATCH,
        plan(plans.graph_of({"a": facts(Kind.NORM, "Norm", 8)}), target_modules="all-linear"), ("no linear layer",),
        (select, "The model has no linear layer", ""),
    ),
    "half of the list": Case(
        rules.DEAD_TARGET, plan(options=STRICT, target_modules=["q_proj", "v_porj"]),
        ("`v_porj`", "Did you mean `v_proj`", "$.adapters.default.target_modules.v_porj"),
        (select, "    dead = config.target_modules - alive - context.options.allow_dead", "    dead = set()"),
    ),
    "half of the list, through the API": warned(
        rules.DEAD_TARGET, plan(target_modules=["q_proj", "v_porj"]), ("`v_porj`",),
        (select, "severity = context.dead if draft.source", "severity = Severity.ERROR if draft.source"),
    ),
    "a target that another option takes away": warned(
        rules.DEAD_TARGET, plan(options=STRICT, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]),
        ("`lm_head` means `lm_head`", "trained whole"),
        (select, "    if lost:  # another", "    if not lost:  # another"),
    ),
    "no default for the model": Case(
        rules.NO_TARGETS, plan(NO_ROLES, target_modules=None), ("model type `decoder`", "all-linear", "`mixer`"),
        (defaults, "    if found is None:\n        return draft.told(_no_default(name, context))\n    chosen", "    if found is None:\n        return draft\n    chosen"),
    ),
    "not a regular expression": Case(
        rules.BAD_PATTERN, plan(target_modules="(q_proj"), ("at character 1", "$.adapters.default.target_modules"),
        (match, "except (re.error,", "except (KeyError,"),
    ),
    "a broken pattern key": Case(
        rules.BAD_PATTERN, plan(rank_pattern={"q[": 3}), ("unterminated", '$.adapters.default.rank_pattern["q["]'),
        (match, "            if _PLAIN_KEY(key):", "            if True:"),
    ),
    "a broken exclusion": Case(
        rules.BAD_PATTERN, plan(exclude_modules="*"), ("nothing to repeat", "exclude_modules"),
        (select, "    if not excluded:\n        return draft\n    try:", "    if excluded:\n        return draft\n    try:"),
    ),
    "an enormous pattern": Case(
        rules.LONG_PATTERN, plan(target_modules="|".join(["q_proj"] * 3000)), ("20,999 characters", "list of names"),
        (match, "    if len(text) > MAX_PATTERN:", "    if False:"),
    ),
    "a pattern that unrolls": Case(
        rules.LONG_PATTERN, plan(target_modules="((q{40}){40}){90}"), ("144,000 repetitions",),
        (match, "    if repeats > MAX_REPEATS:", "    if False:"),
    ),
    "a catastrophic pattern": Case(
        rules.SLOW_PATTERN, plan(target_modules=r"(x|[a-z._0-9]+?)*?([a-z._0-9]+)*(?=.{90})"), ("more than", "nested repetition"),
        (match, "(path, timeout=self._deadline.left())\n        except TimeoutError:", "(path, timeout=self._deadline.left())\n        except KeyError:"),
    ),
    "an exclusion of nothing": Case(
        rules.DEAD_EXCLUDE, plan(options=STRICT, exclude_modules=["v_porj"]), ("`v_porj`", "$.adapters.default.exclude_modules.v_porj"),
        (select, "for entry in sorted(dead - context.options.allow_dead)]", "for entry in ()]"),
    ),
    "an excluded container": Case(
        rules.DEAD_EXCLUDE, plan(options=STRICT, exclude_modules=["self_attn"]), ("not the 3 targets in it", r"(.*\.)?self_attn\..*"),
        (select, "    if below:", "    if False:"),
    ),
    "an exclusion of what is no target": warned(
        rules.DEAD_EXCLUDE, plan(options=STRICT, exclude_modules=["v_proj"]), ("is no target",),
        (select, "    if any(names.find(node.path) for node in context.graph.nodes):\n        what = f\"`{entry}` is no target",
         "    if False:\n        what = f\"`{entry}` is no target"),
    ),
    "an exclusion pattern without effect": Case(
        rules.DEAD_EXCLUDE, plan(options=STRICT, exclude_modules="v_proj"), ("The pattern `v_proj`",),
        (select, "dead = {excluded} if", "dead = set() if"),
    ),
    "a dead pattern key": Case(
        rules.DEAD_PATTERN, plan(options=STRICT, rank_pattern={"v_proj": 3}), ("`v_proj` in `rank_pattern`", "`q_proj`"),
        (select, "dead = [key for key in values if key not in used", "dead = [key for key in () if key not in used"),
    ),
    "a shadowed pattern key": Case(
        rules.DEAD_PATTERN, plan(options=STRICT, alpha_pattern={".*proj": 3, "q_proj": 4}), ("earlier key", "narrower key first"),
        (select, "    if any(alone.find(path) for path in draft.targets):", "    if False:"),
    ),
    "a pattern value out of range": Case(
        rules.BAD_VALUE, plan(rank_pattern={"q_proj": 0}), ("`r` cannot be `0`",),
        (sites, "= changed.revalidated()  #", "= changed  #"),
    ),
    "a layer that is not there": Case(
        rules.DEAD_LAYER, plan(options=STRICT, layers_to_transform=[1, 7]), ("Layer 7", "layers 0 to 2"),
        (select, "for i in sorted(wanted - known)]", "for i in ()]"),
    ),
    "full paths and a layer filter": warned(
        rules.LAYERS_BYPASSED, plan(target_modules=["model.layers.0.self_attn.q_proj", "v_proj"], layers_to_transform=[1]),
        ("`model.layers.0.self_attn.q_proj`",),
        (select, "    if numbered:", "    if False:"),
    ),
    "a layer of another kind": Case(
        rules.BAD_TARGET, plan(target_modules=["q_proj", "model.norm"]), ("`model.norm` is a RMSNorm", "linear"),
        (sites, "if node.facts.kind not in tuner.supports or _is_in_the_way(tuner, node, self._context):", "if False:"),
    ),
    "a container": Case(
        rules.BAD_TARGET, plan(target_modules=["self_attn"]), ("`model.layers.0.self_attn`", "Name the layers in it: `q_proj`, `v_proj`", "2 more"),
        (sites, "if node.facts.kind not in tuner.supports or _is_in_the_way(tuner, node, self._context):", "if False:"),
    ),
    "a rank beyond the layer": warned(
        rules.RANK_BEYOND_LAYER, plan(r=9), ("rank 9", "2 more layers like it"),
        (sites, "kind.problems += tuple(kind.tuner.check(", "kind.problems += () and tuple(kind.tuner.check("),
    ),
    "blocks that do not divide": warned(
        rules.BLOCKS_ADJUSTED, plan(fail="blocks"), ("blocks of 4", "2 more layers like it"),
        (sites, "kind.problems += tuple(kind.tuner.check(", "kind.problems += () and tuple(kind.tuner.check("),
    ),
    "slots that raise": Case(
        rules.PLUGIN_RAISED, plan(fail="slots"), ("`slots` of SAMPLE raised ZeroDivisionError: no slots today", "model.layers.0"),
        (boundary, "        raise _raised(peft_type, function, path, error, frames=2) from error", "        pass"),
    ),
    "a check that raises": Case(
        rules.PLUGIN_RAISED, plan(fail="check"), ("`check` of SAMPLE raised KeyError",),
        (compiler, "        return Draft(config).failed(error)", "        return Draft(config)"),
    ),
    "slots without the prefix": Case(
        rules.PLUGIN_INVALID, plan(fail="prefix"), ("`other` does not begin with `sample_`",),
        (sites, "if not slot.name.startswith(context.method.prefix)]", "if False]"),
    ),
    "slots that no gradient moves": Case(
        rules.PLUGIN_INVALID, plan(fail="whole numbers"), ("`sample_B` is int64 and trainable",),
        (sites, "is {s.dtype} and trainable", "is {s.dtype}"),
    ),
    "slots of no whole size": Case(
        rules.PLUGIN_INVALID, plan(fail="float"), ("`sample_B` has the shape (8, 2.5)",),
        (sites, "any(type(size) is not int for size in slot.shape)", "False"),
    ),
    "slots that are none": Case(
        rules.PLUGIN_INVALID, plan(fail="text"), ("`'sample_B'` is none",),
        (sites, "if not isinstance(slot, Slot)]", "if False]"),
    ),
    "slots without an end": Case(
        rules.PLUGIN_INVALID, plan(fail="endless"), ("more than 1,000",),
        (sites, "if len(slots) > MAX_SLOTS:", "if False:"),
    ),
    "a rank beyond all memory": Case(
        rules.TENSOR_TOO_LARGE, plan(r=2**60), ("`sample_A` has 9.2e+18 numbers", "Choose smaller options"),
        (sites, "    if large:", "    if False:"),
    ),
    "slots without size": Case(
        rules.PLUGIN_INVALID, plan(fail="shape"), ("`sample_B` has the shape [8, 0]",),
        (sites, "if any(size < least for size in s.shape)]", "if False]"),
    ),
    "a module to save that is not there": Case(
        rules.DEAD_SAVE, plan(options=STRICT, modules_to_save=["lm_haed"]), ("`lm_haed`", "Did you mean `lm_head`", "modules_to_save.lm_haed"),
        (sites, "    if not meant and not optional:", "    if False:"),
    ),
    "a module to save inside a name": warned(
        rules.LOOSE_SAVE, plan(modules_to_save=["head"]), ("`head`", "`lm_head`"),
        (sites, "    if loose:", "    if False:"),
    ),
    "a list to save": Case(
        rules.CANNOT_SAVE, plan(modules_to_save=["layers"]), ("modules of type ModuleList, as `model.layers` is",),
        (sites, "        if node.facts.cls in _CONTAINERS:", "        if False:"),
    ),
    "biases where there are none": warned(
        rules.NO_BIAS, plan(bias="all"), ("`bias: all`", "no layer of the model"),
        (sites, "    if not trains:", "    if False:"),
    ),
    "a task without its head": warned(
        rules.NO_HEAD, plan(task_type="SEQ_CLS"), ("`classifier`, `score`", "SEQ_CLS"),
        (sites, "    if heads and not saves:", "    if False:"),
    ),
    "a tied target": warned(
        rules.TIED_TARGET, plan(decoder(tied=True), target_modules=["lm_head"]), ("`lm_head` shares its weight with `model.embed_tokens`",),
        (checks, "    if tied:", "    if False:"),
    ),
    "a tied module to save": warned(
        rules.TIED_TARGET, plan(decoder(tied=True), modules_to_save=["lm_head"]), ("its copy is trained and saved apart",),
        (checks, "        if shared:", "        if False:"),
    ),
    "a router": warned(
        rules.ROUTER_ADAPTED, plan(MIXED, target_modules="all-linear"), ("`model.layers.0.mlp.gate`", "exclude_modules: [gate]"),
        (checks, "    if not routers:", "    if routers:"),
    ),
    "experts as parameters": warned(
        rules.EXPERTS_MISSED, plan(MIXED, target_modules=["up_proj"]), ("1,024 parameters in `model.layers.0.mlp.experts`",),
        (checks, "    if not missed or not wanted:", "    if True:"),
    ),
    "a part of a fused weight": Case(
        rules.PART_OF_FUSED, fused("w1"), ("`w1` is a part of `model.layers.0.mlp.experts.up`", "`w3`"),
        (former, "if target.meaning.missing or target.meaning.uneven", "if False"),
    ),
    "some experts of a fused weight": Case(
        rules.PART_OF_FUSED, fused("moe.1.w1", "moe.1.w3"), ("some of the experts",),
        (former, "if target.meaning.missing or target.meaning.uneven", "if target.meaning.missing"),
    ),
    "layers of another kind": warned(
        rules.UNEVEN_COVERAGE, plan(HYBRID), ("1 of 3 layers", "`model.layers.2.mixer.in_proj`"),
        (checks, "        if missed and not draft.dropped:", "        if False:"),
    ),
    "another tower": warned(
        rules.TOWER_ADAPTED, plan(VISION), ("1 of 4 targets are in `vision`", r"vision\..*"),
        (checks, "    if not inside or len(inside)", "    if True or len(inside)"),
    ),
    "weights read by kernels": warned(
        rules.READ_DIRECTLY, plan(MAMBA, target_modules=["q_proj", "out_proj"]), ("`model.layers.0.mixer.out_proj`", "exclude_modules: [out_proj]"),
        (checks, "    if not hit:\n        return draft\n    names", "    if hit:\n        return draft\n    names"),
    ),
    "a layer without a derivative": warned(
        rules.GRADIENT_STOPS, plan(CLOSED, target_modules=["v_proj"]), ("`model.layers.1.self_attn.q_proj` (sealing)", "another quantisation"),
        (checks, "    if not closed:", "    if True:"),
    ),
    "an orientation that no layer has": warned(
        rules.ORIENTATION, plan(fan_in_fan_out=True), ("fan_in_fan_out",),
        (sites, "    if given and not transposed:", "    if False:"),
    ),
    "a prompt without a length": Case(
        rules.PROMPT_SIZE, prompt(num_virtual_tokens=None), ("`num_virtual_tokens` is not set",),
        (prompts, "    if missing is not None:", "    if False:"),
    ),
    "a prompt of another width": Case(
        rules.PROMPT_SIZE, prompt(token_dim=5), ("`token_dim` is 5, but the model's is",),
        (prompts, "        if given is not None and given != value:", "        if False:"),
    ),
    "a prompt for a model without embeddings": Case(
        rules.NO_EMBEDDINGS, prompt(replace(decoder(), model=replace(decoder().model, input_embeddings=None))), ("`Decoder`",),
        (prompts, "    if model.input_embeddings is None:", "    if False:"),
    ),
    "a prompt of encoder-decoders for a decoder": Case(
        rules.TASK_MISFIT, prompt(decoder(), task_type="SEQ_2_SEQ_LM"), ("is no encoder-decoder", "`CAUSAL_LM`"),
        (prompts, "if translates is not None and", "if False and"),
    ),
    "a config without a type": Case(
        rules.NO_TYPE, together(PeftConfig()), ("`adapter0`", "SAMPLE"),
        (compiler, "    if not config.peft_type:", "    if False:"),
    ),
    "two methods on one model": Case(
        rules.MIXED_TYPES, together(sample(), PromptConfig(num_virtual_tokens=2)), ("SAMPLE, SAMPLE_PROMPT",),
        (compiler, "    elif len(types) > 1:", "    elif False:"),
    ),
    "biases that two adapters would share": Case(
        rules.ADAPTERS_CONFLICT,
        lambda: compiler.compile_plan(decoder(bias=True), {"a": sample(bias="all"), "b": sample()}, registry=plans.registry()),
        ("`a` trains biases", "$.adapters.a.bias"),
        (compiler, "    if training and len(plans) > 1:", "    if False:"),
    ),
    "adapted by one and copied by the other": Case(
        rules.ADAPTERS_CONFLICT, together(sample(modules_to_save=["lm_head"]), sample(target_modules=["lm_head"])),
        ("`adapter0` trains `lm_head` whole while `adapter1` adapts `lm_head`",),
        (compiler, "            if hit is not None:", "            if False:"),
    ),
    "an active adapter that is not there": Case(
        rules.UNKNOWN_ADAPTER, plan(options={"active": ["defualt"]}), ("`defualt`", "Did you mean `default`"),
        (compiler, "for name in chosen if name not in adapters))", "for name in chosen if False))"),
    ),
    "an unknown module to explain": Case(
        rules.UNKNOWN_MODULE,
        lambda: explain.explain(decoder(), "default", sample(), "model.layers.1.self_attn.q_porj", plans.registry()),
        ("Did you mean `model.layers.", "self_attn.q_proj`"),
        (explain, "    if node is None:", "    if node is None and False:"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_told(name: str) -> None:
    examine(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_test_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    match._compiled.cache_clear()
    put_defect(monkeypatch, *case.defect)
    with pytest.raises(Exception):  # noqa: B017 - an assertion fails, or what the defect lets through does
        examine(case)


def test_all_problems_of_all_adapters_come_at_once() -> None:
    bad = {
        "a": sample(target_modules=["q_porj"], modules_to_save=["lm_haed"]),
        "b": sample(rank_pattern={"v_proj": 1}, exclude_modules=["nothing"], layers_to_transform=[9]),
        "c": sample(target_modules="("),
    }
    with pytest.raises(PeftcError) as caught:
        compiler.compile_plan(decoder(), bad, strict=True, registry=plans.registry(), active=["d"])
    told = {d.code for d in caught.value.diagnostics}
    expected = (
        rules.NO_MATCH,
        rules.DEAD_SAVE,
        rules.DEAD_EXCLUDE,
        rules.DEAD_LAYER,
        rules.BAD_PATTERN,
        rules.UNKNOWN_ADAPTER,
    )
    assert told >= {rule.code for rule in expected}


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], "all-linear", r".*\.(q|v)_proj", ["model.layers.0.mlp.up_proj"]]
)
@pytest.mark.parametrize("graph", [decoder(), decoder(tied=True), decoder(bias=True, dtype="bfloat16")])
def test_nothing_is_told_without_a_reason(graph: Any, targets: Any) -> None:
    assert plans.planned(graph, STRICT, target_modules=targets).warnings == ()


def test_dead_entries_can_be_allowed() -> None:
    options = {"strict": True, "allow_dead": ["v_porj", "k_proj", "gone"]}
    config = {"target_modules": ["q_proj", "v_porj"], "rank_pattern": {"k_proj": 2}, "exclude_modules": ["gone"]}
    assert plans.planned(None, options, **config).warnings == ()


def test_a_layer_without_a_derivative_is_no_matter_where_nothing_trains() -> None:
    assert plans.codes(plans.planned(CLOSED, target_modules=["v_proj"], inference_mode=True)) == []


def test_a_container_that_is_not_at_fault_is_not_named() -> None:
    graph = and_modules(decoder(), {"pooler": container("Pooler")})
    assert plans.codes(plans.planned(graph, target_modules=["q_proj"])) == []


def test_a_head_that_the_task_names_may_be_missing() -> None:
    plan = plans.planned(CLASSIFIER, STRICT, target_modules=["q_proj"], task_type="SEQ_CLS")
    assert [save.path for save in plan.adapters[0].saves] == ["classifier"]
    assert plan.warnings == ()


def test_no_target_at_all_is_the_error_that_users_of_the_reference_catch() -> None:
    with pytest.raises(NoMatchingPeftModuleError) as caught:
        plans.planned(decoder(), target_modules=["nothing"])
    assert isinstance(caught.value, (PeftError, ValueError))
    with pytest.raises(PeftError) as other:
        plans.planned(decoder(), target_modules="(")
    assert not isinstance(other.value, NoMatchingPeftModuleError)
