"""The conformance kit can fail: for every check there is a plugin, or a change of the core, that it catches by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional

from peftc import rules
from peftc.compiler.passes import order as passes
from peftc.compiler.passes import select
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import PeftcError, warn
from peftc.graph.nodes import Kind
from peftc.model import peft_model
from peftc.model.functions import hotswap
from peftc.model.parts import rows
from peftc.model.peft_model import PeftModel
from peftc.ops.factors import of_thin
from peftc.registry.manager import default_registry
from peftc.runtime.applying import conversion
from peftc.runtime.around.saved_modules import ModulesToSaveWrapper
from peftc.runtime.journal import Journal
from peftc.runtime.layer import folding
from peftc.runtime.layer.experts import over_experts
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.prompt.driver import PromptDriver
from peftc.runtime.session import succession, together
from peftc.runtime.session.session import Session
from peftc.testing import check, examine
from peftc.testing.checks import lifecycle
from peftc.testing.kit import Case, all_checks, cases
from peftc.testing.storage import RoundedLinear, RoundedRows, rounded
from peftc.tuner.experts import PerExpert
from peftc.tuner.method import TunerMethod
from tests.mutation import imports_torch, mutants, sound, test_cells
from tests.mutation.mutants import CHOICE, FUNCTIONS, LOWERINGS, MUTANTS
from tests.mutation.sound import SOUND_METHODS

Choose = Callable[[str], None]
Patch = pytest.MonkeyPatch


@pytest.fixture
def choose(monkeypatch: Patch) -> Iterator[Choose]:
    """Chooses what the plugin module brings, and takes it out of the registry afterwards."""
    yield lambda name: monkeypatch.setenv(CHOICE, name)
    default_registry().forget("MUTANT")


def case_of(check_name: str) -> Case:
    """The first case of a check: that on the smallest model it is run on."""
    return next(case for case in cases(mutants) if case.check == check_name)


@pytest.mark.parametrize("name", SOUND_METHODS)
def test_a_sound_plugin_passes_every_check(name: str, choose: Choose) -> None:
    choose(name)
    firsts = {case.check: case for case in reversed(cases(mutants))}
    for case in firsts.values():
        case.run()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, choose: Choose) -> None:
    choose(name)
    mutant = MUTANTS[name]
    with pytest.raises(PeftcError) as caught:
        case_of(mutant.check).run()
    assert mutant.says in str(caught.value)
    assert all(problem.fix for problem in caught.value.diagnostics)


@pytest.mark.parametrize("name", MUTANTS)
def test_its_sound_twin_passes_the_check(name: str, choose: Choose) -> None:
    twin = SOUND_METHODS[MUTANTS[name].twin]
    assert isinstance(MUTANTS[name].method.tuner, type(twin.tuner))
    choose(MUTANTS[name].twin)
    case_of(MUTANTS[name].check).run()


def test_a_plugin_that_imports_torch_is_caught(choose: Choose) -> None:
    choose("sound")
    case = next(case for case in cases(imports_torch) if case.check == "loads_without_torch")
    with pytest.raises(PeftcError, match="imports torch"):
        case.run()


# what no plugin can break: changes of the core -------------------------------------------------------------------------


def name_in_keys(patch: Patch) -> None:
    tensors = Session.tensors
    patch.setattr(Session, "tensors", lambda s, name, *a: {f"{k}.{name}": t for k, t in tensors(s, name, *a).items()})


def never_disabled(patch: Patch) -> None:
    patch.setattr(
        TunerLayer, "enable_adapters", lambda layer, enabled: vars(layer).update(_path=vars(layer)["_composed"])
    )


def never_unloaded(patch: Patch) -> None:
    patch.setattr(Session, "_put_back", lambda *args: None)


def never_set_aside(patch: Patch) -> None:
    patch.setattr(TunerLayer, "settle", lambda layer: None)


def nobody_takes_over(patch: Patch) -> None:
    patch.setattr(succession, "_heir", lambda session: None)


def never_injected(patch: Patch) -> None:
    patch.setattr(lifecycle, "inject_adapter_in_model", lambda config, model: model)


def never_undone(patch: Patch) -> None:
    patch.setattr(Journal, "undo", lambda journal, error: journal.close())  # left as usual, with nothing put back


def never_refused(patch: Patch) -> None:
    for module in (peft_model, together):  # without layers nothing is merged, and nobody is told
        patch.setattr(module, "refuse_prompts", lambda: None)


def changed_call(patch: Patch, change: Callable[[dict[str, Any]], None]) -> None:
    widened = PromptDriver.widened

    def wrong(driver: PromptDriver, *given: Any) -> dict[str, Any]:
        call = widened(driver, *given)
        change(call)
        return call

    patch.setattr(PromptDriver, "widened", wrong)


def prompt_at_the_end(patch: Patch) -> None:
    def turn(call: dict[str, Any]) -> None:
        embeds: Tensor = call["inputs_embeds"]
        call["inputs_embeds"] = embeds.roll(-3, dims=1)

    changed_call(patch, turn)


def labels_on_the_prompt(patch: Patch) -> None:
    def label(call: dict[str, Any]) -> None:
        call["labels"] = call["labels"].clamp(min=1)

    changed_call(patch, label)


def generation_without_prompt(patch: Patch) -> None:
    patch.setattr(PromptDriver, "generating", lambda driver, *args: nullcontext(SimpleNamespace(refuse_unused=list)))


def never_aside(patch: Patch) -> None:
    parameters = AdapterPlan.parameters
    patch.setattr(AdapterPlan, "parameters", lambda plan, trainable=True, *others: parameters(plan, trainable))


def always_together(patch: Patch) -> None:
    patch.setattr(together, "together", lambda plans, tuner_of: ())


def checkpointing_allowed(patch: Patch) -> None:
    patch.setattr(PeftModel, "_refuse_checkpointing", lambda model: None)


def rows_allowed(patch: Patch) -> None:
    patch.setattr(rows, "_problems", lambda *args: iter(()))


def any_kind(patch: Patch) -> None:
    patch.setattr(sound.Sound, "supports", frozenset(Kind))
    patch.setattr(TunerMethod, "supports", frozenset())


def none_excluded(patch: Patch) -> None:
    patch.setattr(passes, "PASSES", tuple(step for step in passes.PASSES if step is not select.exclude))


def never_overridden(patch: Patch) -> None:
    patch.setattr(passes, "PASSES", tuple(step for step in passes.PASSES if step is not select.apply_patterns))


def frozen_copies(patch: Patch) -> None:
    patch.setattr(ModulesToSaveWrapper, "activate", lambda wrapper, names: None)


def never_swapped(patch: Patch) -> None:
    patch.setattr(hotswap, "_swap", lambda *args: None)


def half_converted(patch: Patch) -> None:
    patch.setattr(conversion, "of_thin", lambda A, B, rank: of_thin(A / 2, B, rank))


def experts_mixed_up(patch: Patch) -> None:
    patch.setattr(folding, "over_experts", lambda *args: over_experts(*args).roll(1, dims=0))


def experts_joined_backwards(patch: Patch) -> None:
    joined = PerExpert.joined
    patch.setattr(
        PerExpert, "joined", lambda tuner, c, layer, label, experts: joined(tuner, c, layer, label, experts[::-1])
    )


def experts_as_layers(patch: Patch) -> None:
    patch.setattr(AdapterPlan, "adapts_parameters", False)


def opened_otherwise(patch: Patch) -> None:
    patch.setattr(RoundedLinear, "forward", lambda layer, x: functional.linear(x, 1.5 * layer.numbers(), layer.bias))


def never_packed_anew(patch: Patch) -> None:
    patch.setattr(RoundedRows, "pack", lambda storage, layer, weight: rounded(1.5 * weight))


CORE: dict[str, tuple[str, Callable[[Patch], None], str]] = {
    "keys_follow_the_rule": ("sound", name_in_keys, "its_name"),
    "disabled_is_base": ("sound", never_disabled, "disabled"),
    "disabled_is_base_while_merged": ("sound", never_set_aside, "while merged and disabled"),
    "unloading_restores": ("sound", never_unloaded, "Unloading leaves"),
    "another_takes_over": ("sound", nobody_takes_over, "does not say that `first` is active now"),
    "injected_equals_wrapped": ("sound", never_injected, "lacks"),
    "failed_apply_restores": ("sound", never_undone, "are changed"),
    "what_is_not_declared_is_refused": ("sound_prompt", rows_allowed, "`rows`"),
    "other_kinds_are_refused": ("sound", any_kind, "does not declare"),
    "excluded_modules_are_left_alone": ("sound", none_excluded, "one is excluded"),
    "patterns_reach_their_layer": ("sound", never_overridden, "`r_pattern`"),
    "saved_modules_ride_along": ("sound", frozen_copies, "does not train"),
    "trains_as_on_plain_layers": ("sound", opened_otherwise, "opens other weights"),
    "merges_into_packed_layers": ("sound", never_packed_anew, "is off by"),
    "swapping_exchanges_values": ("sound", never_swapped, "swapped in"),
    "conversion_is_exact_at_full_rank": ("sound", half_converted, "converted"),
    "experts_change_as_layers": ("sound", experts_mixed_up, "The change of expert 0 of"),
    "experts_part_and_join": ("sound", experts_joined_backwards, "parted and joined"),
    "what_experts_cannot_is_refused": ("sound", experts_as_layers, "not refused"),
    "merging_is_refused": ("sound_prompt", never_refused, "not refused"),
    "plan_of_several_equals_model": ("sound_around", never_aside, "of one name twice"),
    "one_acts_at_a_time": ("sound_around", always_together, "active together"),
    "prompt_goes_before_the_input": ("sound_prompt", prompt_at_the_end, "logits"),
    "labels_skip_the_prompt": ("sound_prompt", labels_on_the_prompt, "loss"),
    "generation_sees_the_prompt": ("sound_prompt", generation_without_prompt, "generated"),
    "checkpointing_is_refused": ("sound_cache", checkpointing_allowed, "not refused"),
}


@pytest.mark.parametrize("name", CORE)
def test_a_broken_core_is_caught(name: str, choose: Choose, monkeypatch: Patch) -> None:
    plugin, break_it, says = CORE[name]
    choose(plugin)
    case = case_of(name)
    break_it(monkeypatch)
    with pytest.raises(PeftcError) as caught:
        case.run()
    assert says in str(caught.value)


def test_every_check_has_a_mutation() -> None:
    here = {mutant.check for mutant in MUTANTS.values()} | set(CORE) | {"loads_without_torch"}
    assert {check.__name__ for check in all_checks()} == here | {test_cells.CHECK}


# a plugin that raises ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_that_raises_is_named_and_leaves_the_model_alone(function: str, choose: Choose) -> None:
    choose(f"raising_{function}")
    subject = cases(mutants)[0].subject
    base = subject.build()
    before = {name: (id(module), module.training) for name, module in base.named_modules()}
    with pytest.raises(PeftcError) as caught:
        subject.run(PeftModel(base, subject.config()))
    (problem, *_) = caught.value.diagnostics
    assert (problem.code, f"`{function}` of MUTANT raised ZeroDivisionError" in problem.what) == ("PC205", True)
    if function not in LOWERINGS:  # those are first called in forward, when the adapter is on
        assert {name: (id(module), module.training) for name, module in base.named_modules()} == before
        assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_kit_names_a_function_that_raises_and_its_line(function: str, choose: Choose) -> None:
    choose(f"raising_{function}")
    report = examine(mutants, "acts_when_trained")
    assert report.failed == ("acts_when_trained",)
    assert f"`{function}` of MUTANT raised ZeroDivisionError: on purpose" in str(report)
    assert 'raise ZeroDivisionError("on purpose")' in str(report)


# the report -------------------------------------------------------------------------------------------------------------


def test_the_report_names_method_check_options_and_model(choose: Choose) -> None:
    choose("starts_somewhere")
    report = examine(mutants, "starts_as_declared", "acts_when_trained")
    assert report.failed == ("starts_as_declared",)
    text = str(report)
    assert "MUTANT fails" in text
    assert "starts_as_declared, on no-options-mlp" in text
    assert "Training should begin from the base model" in text
    assert text.count("identity_at_start") == 1, "the same problem on another model is not told again"


def test_the_report_shows_the_line_that_raised(choose: Choose) -> None:
    choose("three_dimensions_only")
    text = str(examine(mutants, "any_leading_shape"))
    assert "mutants.py" in text and "in branch: batch, length, _ = x.shape" in text


def test_warnings_that_checks_provoke_are_not_shown(choose: Choose) -> None:
    choose("sound")
    told = rules.BIAS_GAINED("The layer had none", fix="Nothing.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(case_of("plan_survives_json"), call=lambda: warn([told])).run()


def test_a_check_that_is_not_there_is_named(choose: Choose) -> None:
    choose("sound")
    with pytest.raises(PeftcError, match="Did you mean `starts_as_declared`") as caught:
        examine(mutants, "starts_as_declare", "merging_is_refused")
    assert [d.code for d in caught.value.diagnostics] == [rules.UNKNOWN_CHECK.code] * 2


def test_check_raises_everything_or_returns_the_report(choose: Choose) -> None:
    choose("starts_somewhere")
    assert "passes all" in str(check(mutants, "acts_when_trained"))
    with pytest.raises(PeftcError) as caught:
        check(mutants, "starts_as_declared")
    assert {problem.code for problem in caught.value.diagnostics} == {"PC207"}
    assert len(caught.value.diagnostics) > 1


def test_a_plugin_that_is_not_there_is_named() -> None:
    with pytest.raises(PeftcError, match="PC201"):
        examine("NOT_INSTALLED")


def test_the_core_of_the_kit_runs_without_a_model_of_its_own(choose: Choose) -> None:
    """A case can be run twice and in any order: nothing of one run is left for the next."""
    choose("sound")
    case = case_of("adapters_do_not_leak")
    case.run()
    case.run()
    assert isinstance(case.subject.build(), nn.Module)
