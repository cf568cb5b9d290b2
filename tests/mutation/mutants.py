"""Plugins that break one promise each: what the conformance kit must catch.

Another process loads this module too, so the one to bring is chosen by the environment variable `PEFTC_TEST_MUTANT`.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pydantic

from peftc.plugin import (
    BiasMixin,
    Container,
    LayerFacts,
    MapTuner,
    ModuleView,
    PromptView,
    Slot,
    SlotInit,
    TunerMethod,
    View,
    hookimpl,
    module_slot,
    parameter_slot,
)
from tests.mutation.sound import (
    SOUND_AROUND,
    SOUND_METHODS,
    SOUND_PROMPT,
    MutantConfig,
    MutantPromptConfig,
    Sound,
    SoundAround,
    SoundBranch,
    SoundParams,
    SoundPrompt,
    SoundScale,
    record,
)

LOWERINGS = ("thin", "branch", "input", "output", "params")
CHOICE = "PEFTC_TEST_MUTANT"


@dataclass(frozen=True)
class Mutant:
    """A broken plugin, the check that must catch it, and words that its message must have."""

    method: TunerMethod
    check: str
    says: str
    #: the sound method that it is but for the one mistake: that one passes the check
    twin: str = "sound"


class CombinesTwice(Sound):
    def of_thin(self, c: MutantConfig, layer: LayerFacts, A: Any, B: Any) -> Mapping[str, Any]:
        return {"mut_down": A, "mut_up": 2 * B}


class ShapeOfTheProcess(Sound):
    def slots(self, c: MutantConfig, layer: LayerFacts) -> Iterable[Slot]:
        rank = c.r + ("torch" in sys.modules)
        yield module_slot("mut_down", (rank, layer.in_features))
        yield parameter_slot("mut_up", (layer.out_features, rank))


class ShapeOfTheCall(Sound):
    calls = itertools.count(1)

    def slots(self, c: MutantConfig, layer: LayerFacts) -> Iterable[Slot]:
        rank = next(self.calls)
        yield module_slot("mut_down", (rank, layer.in_features))
        yield parameter_slot("mut_up", (layer.out_features, rank))


class ListForShape(Sound):
    def slots(self, c: MutantConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield module_slot("mut_down", [c.r, layer.in_features])  # type: ignore[arg-type]
        yield parameter_slot("mut_up", (layer.out_features, c.r))


class SlotInDouble(Sound):
    def slots(self, c: MutantConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield module_slot("mut_down", (c.r, layer.in_features))
        yield Slot("mut_up", (layer.out_features, c.r), Container.PARAMETER, dtype="float64")


class UnsavedSlot(Sound):
    def slots(self, c: MutantConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield Slot("mut_down", (c.r, layer.in_features), Container.MODULE, "weight", saved=False)
        yield parameter_slot("mut_up", (layer.out_features, c.r))


class ReadsContentInInit(Sound):
    def init(self, c: MutantConfig, layer: LayerFacts, slots: Mapping[str, Any], init: SlotInit) -> None:
        super().init(c, layer, slots, init)
        assert float(slots["mut_down"].norm()) > 0


class StartsSomewhere(Sound):
    def init(self, c: MutantConfig, layer: LayerFacts, slots: Mapping[str, Any], init: SlotInit) -> None:
        for tensor in slots.values():
            init.normal(tensor)


class StartsNowhere(Sound):
    def init(self, c: MutantConfig, layer: LayerFacts, slots: Mapping[str, Any], init: SlotInit) -> None:
        for tensor in slots.values():
            init.zeros(tensor)


class StartsWithNan(Sound):
    def init(self, c: MutantConfig, layer: LayerFacts, slots: Mapping[str, Any], init: SlotInit) -> None:
        super().init(c, layer, slots, init)
        slots["mut_up"].fill_(float("nan"))


class StartsByTheClock(Sound):
    def init(self, c: MutantConfig, layer: LayerFacts, slots: Mapping[str, Any], init: SlotInit) -> None:
        super().init(c, layer, slots, init)
        slots["mut_down"].fill_(int.from_bytes(os.urandom(2), "big") / 65536)


class NoEffect(Sound):
    def thin(self, a: View) -> tuple[Any, Any, float]:
        return a.mut_down, a.mut_up, 0.0


class MergesTwice(Sound):
    def params(self, a: View, p: Mapping[str, Any], p0: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**p, "weight": p["weight"] + 2 * (a.mut_up @ a.mut_down)}


class MergesInPlace(Sound):
    def params(self, a: View, p: Mapping[str, Any], p0: Mapping[str, Any]) -> Mapping[str, Any]:
        p["weight"].add_(a.mut_up @ a.mut_down)
        return {**p, "weight": p["weight"].clone()}


class MergesPristine(Sound):
    def params(self, a: View, p: Mapping[str, Any], p0: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**p, "weight": p0["weight"] + a.mut_up @ a.mut_down}


class ClaimsToAdd(Sound):
    additive, thin, branch = True, MapTuner.thin, MapTuner.branch

    def params(self, a: View, p: Mapping[str, Any], p0: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**p, "weight": p["weight"] * (1 + a.mut_up @ a.mut_down)}


class BranchOfItsOwn(Sound):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        return 3 * super().branch(a, x, y0)


class ThreeDimensionsOnly(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        batch, length, _ = x.shape
        return super().branch(a, x, y0).view(batch, length, -1)


class LooksAtValues(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        return super().branch(a, x, y0) if float(x.detach().sum()) != 0.5 else 0 * y0


class CouplesRows(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        return super().branch(a, x - x.mean(0), y0)


class Detached(Sound):
    def thin(self, a: View) -> tuple[Any, Any, float]:
        return a.mut_down, a.mut_up.detach(), 1.0


class HalfDetached(Sound):
    def thin(self, a: View) -> tuple[Any, Any, float]:
        return (a.mut_down + a.mut_down.detach()) / 2, a.mut_up, 1.0


class CountsCalls(SoundBranch):
    calls = itertools.count(1)

    def branch(self, a: View, x: Any, y0: Any) -> Any:
        return super().branch(a, x, y0) * next(self.calls)


class KeepsTheInput(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        self.last = x
        return super().branch(a, x, y0)


class KeepsTheFirst(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        views = self.__dict__.setdefault("views", {})
        return super().branch(views.setdefault(a.layer, a), x, y0)


class KeepsAll(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        self.__dict__.setdefault("seen", []).append(a.mut_up)
        return super().branch(a, x, y0)


class HoldsALock(Sound):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class SearchesInNames(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        name: str = a.adapter  # type: ignore[assignment]  # not part of the protocol
        return super().branch(a, x, y0) * (0.0 if name.startswith("mut_") else 1.0)


class FactorsTurned(Sound):
    def thin(self, a: View) -> tuple[Any, Any, float]:
        return a.mut_down.T, a.mut_up.T, a.scaling


class BranchOfAnotherWidth(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        return super().branch(a, x, y0)[..., :1]


class ScaleOfAnotherWidth(SoundScale):
    def output(self, a: View, y: Any) -> Any:
        return y.sum(-1, keepdim=True) * a.mut_up[:1]


class ForgetsTheBias(SoundParams):
    def params(self, a: View, p: Mapping[str, Any], p0: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"weight": super().params(a, p, p0)["weight"]}


class CutsTheLayerOff(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        return super().branch(a, x, y0) + (y0.detach() - y0)


class FrozenOnTheQuiet(Sound):
    def init(self, c: MutantConfig, layer: LayerFacts, slots: Mapping[str, Any], init: SlotInit) -> None:
        super().init(c, layer, slots, init)
        slots["mut_down"].add_(1.0)

    def thin(self, a: View) -> tuple[Any, Any, float]:
        return a.mut_down.data, a.mut_up, 1.0


class DrawsInEveryCall(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        return super().branch(a, x, y0) * (1 + 0.01 * x.new_empty(1).normal_())


class CountsInItsModule(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        _SEEN.append(1)
        return super().branch(a, x, y0) * (1 + 0.01 * len(_SEEN))


_SEEN: list[int] = []


class ScalesItsInput(SoundScale):
    def input(self, a: View, x: Any) -> Any:
        return x.mul_(a.mut_down)


class AddsIntoTheOutput(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        x.add_(1e-3)
        return super().branch(a, x, y0)


class WritesIntoASlot(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        a.mut_up.data.add_(1e-2)
        return super().branch(a, x, y0)


class ChangesOptionsAtStart(Sound):
    def init(self, c: MutantConfig, layer: LayerFacts, slots: Mapping[str, Any], init: SlotInit) -> None:
        super().init(c, layer, slots, init)
        c.r = 99


class ChangesOptionsInPlans(Sound):
    def slots(self, c: MutantConfig, layer: LayerFacts) -> Iterable[Slot]:
        c.inference_mode = True
        return super().slots(c, layer)


class ChangesOptionsInCalls(SoundBranch):
    def branch(self, a: View, x: Any, y0: Any) -> Any:
        a.config.inference_mode = True
        return super().branch(a, x, y0)


class SlotOutsideThePrefix(Sound):
    def slots(self, c: MutantConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield from super().slots(c, layer)
        yield parameter_slot("other_scale", (1,), trainable=False)

    def init(self, c: MutantConfig, layer: LayerFacts, slots: Mapping[str, Any], init: SlotInit) -> None:
        super().init(c, layer, slots, init)
        init.ones(slots["other_scale"])


class KeysThatJsonLacks(MutantConfig):
    table: dict[int, str] = pydantic.Field(default_factory=dict)


class AnyWordForBiases(BiasMixin, MutantConfig):
    """Lists none."""


class BiasesByAnotherName(MutantConfig):
    bias: Literal["none", "all", "mut_only"] = "none"


class ShortPrompt(SoundPrompt):
    def embeds(self, c: MutantPromptConfig, a: PromptView) -> Any:
        return a.rows[:-1]


class ByLength(SoundAround):
    def shift(self, a: ModuleView, y: Any) -> Any:
        return super().shift(a, y) * y.shape[1]


class KeepsTheView(SoundAround):
    def shift(self, a: ModuleView, y: Any) -> Any:
        first = self.__dict__.setdefault("first", a)
        return super().shift(first, y)


class UnfreezesTheModule(SoundAround):
    def forward(self, a: ModuleView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        a.module.requires_grad_(True)
        return super().forward(a, args, kwargs)


class OneSlotShort(SoundAround):
    def shift(self, a: ModuleView, y: Any) -> Any:
        return a.mut_gate


MUTANTS: dict[str, Mutant] = {
    "shape_of_the_process": Mutant(record(ShapeOfTheProcess()), "plan_equals_model", "is planned as"),
    "shape_of_the_call": Mutant(record(ShapeOfTheCall()), "compiling_leaves_the_config_alone", "gives two plans"),
    "list_for_shape": Mutant(record(ListForShape()), "plan_survives_json", "no tuple of whole numbers"),
    "slot_in_double": Mutant(record(SlotInDouble()), "half_precision_bases", "torch.float64"),
    "unsaved_slot": Mutant(record(UnsavedSlot()), "saving_and_loading_is_exact", "differs by"),
    "reads_content": Mutant(record(ReadsContentInInit()), "works_without_storage", "`init` of MUTANT raised"),
    "starts_somewhere": Mutant(record(StartsSomewhere()), "starts_as_declared", "not the base's"),
    "starts_with_nan": Mutant(record(StartsWithNan()), "starts_as_declared", "not finite"),
    "starts_nowhere": Mutant(record(StartsNowhere()), "a_step_changes_slots_only", "where it was"),
    "starts_by_the_clock": Mutant(record(StartsByTheClock()), "starts_from_the_seed", "from one seed"),
    "no_effect": Mutant(record(NoEffect()), "acts_when_trained", "change nothing"),
    "merges_twice": Mutant(record(MergesTwice()), "merged_equals_unmerged", "while merged"),
    "merges_in_place": Mutant(record(MergesInPlace()), "unmerging_restores", "unmerged model"),
    "merges_in_place_too": Mutant(record(MergesInPlace()), "merging_leaves_tensors_alone", "in place"),
    "merges_pristine": Mutant(record(MergesPristine()), "several_active_merge_alike", "both merged"),
    "combines_twice": Mutant(record(CombinesTwice()), "combining_adds_updates", "compared with their sum"),
    "claims_to_add": Mutant(record(ClaimsToAdd()), "additive_changes_do_not_read_the_weight", "was moved"),
    "branch_of_its_own": Mutant(record(BranchOfItsOwn()), "lowerings_agree", "`branch`"),
    "three_dimensions_only": Mutant(
        record(ThreeDimensionsOnly()), "any_leading_shape", "not enough values", "sound_branch"
    ),
    "looks_at_values": Mutant(record(LooksAtValues()), "compiles", "raised", "sound_branch"),
    "couples_rows": Mutant(record(CouplesRows()), "rows_are_as_alone", "adapter for each row", "sound_branch"),
    "detached": Mutant(record(Detached()), "gradients_in_slots_only", "lacks"),
    "half_detached": Mutant(record(HalfDetached()), "gradients_are_true", "slope"),
    "counts_calls": Mutant(record(CountsCalls()), "checkpointing_reaches_every_slot", "checkpointing", "sound_branch"),
    "keeps_the_input": Mutant(record(KeepsTheInput()), "method_is_stateless", "changed its attributes", "sound_branch"),
    "keeps_the_first": Mutant(record(KeepsTheFirst()), "adapters_do_not_leak", "same output", "sound_branch"),
    "keeps_all": Mutant(record(KeepsAll()), "deleting_leaves_nothing", "still in memory", "sound_branch"),
    "holds_a_lock": Mutant(record(HoldsALock()), "copies_are_equal_and_apart", "pickle"),
    "searches_in_names": Mutant(record(SearchesInNames()), "any_adapter_name", "called `mut_down`", "sound_branch"),
    "factors_turned": Mutant(record(FactorsTurned()), "lowerings_have_their_shapes", "`thin's A` gives"),
    "branch_of_another_width": Mutant(
        record(BranchOfAnotherWidth()), "lowerings_have_their_shapes", "`branch` gives (2, 3, 1)", "sound_branch"
    ),
    "scale_of_another_width": Mutant(
        record(ScaleOfAnotherWidth()), "lowerings_have_their_shapes", "`output` gives (3, 1)", "sound_scale"
    ),
    "forgets_the_bias": Mutant(
        record(ForgetsTheBias()), "lowerings_have_their_shapes", "`params' bias` gives ()", "sound_params"
    ),
    "cuts_the_layer_off": Mutant(record(CutsTheLayerOff()), "gradients_are_true", "slope", "sound_branch"),
    "frozen_on_the_quiet": Mutant(record(FrozenOnTheQuiet()), "gradients_in_slots_only", "without detaching it"),
    "draws_in_every_call": Mutant(
        record(DrawsInEveryCall()), "calls_change_nothing", "draws from torch's random numbers", "sound_branch"
    ),
    "counts_in_its_module": Mutant(
        record(CountsInItsModule()), "calls_change_nothing", "Keep no state between calls", "sound_branch"
    ),
    "scales_its_input": Mutant(record(ScalesItsInput()), "calls_change_nothing", "The input of", "sound_scale"),
    "adds_into_its_input": Mutant(record(AddsIntoTheOutput()), "calls_change_nothing", "in place", "sound_branch"),
    "writes_into_a_slot": Mutant(record(WritesIntoASlot()), "calls_change_nothing", "state between", "sound_branch"),
    "changes_options_at_start": Mutant(
        record(ChangesOptionsAtStart()), "starting_leaves_the_config_alone", "changed its options ['r']"
    ),
    "changes_options_in_plans": Mutant(
        record(ChangesOptionsInPlans()), "compiling_leaves_the_config_alone", "other options ['inference_mode']"
    ),
    "changes_options_in_calls": Mutant(
        record(ChangesOptionsInCalls()), "calls_change_nothing", "changed the config", "sound_branch"
    ),
    "slot_outside_the_prefix": Mutant(
        record(SlotOutsideThePrefix()), "record_names_its_slots", "does not begin with `mut_`"
    ),
    "unnamed_slot": Mutant(record(Sound(), layer_names=("mut_down",)), "record_names_its_slots", "mut_up"),
    "keys_that_json_lacks": Mutant(
        record(Sound(), config=KeysThatJsonLacks, examples=({"table": {1: "a"}},)), "config_survives_files", "table"
    ),
    "values_for_nobody": Mutant(
        record(Sound(), example_values=lambda c, rows: {"colour": [0] * rows}),
        "what_is_declared_is_used",
        "gives `colour`, which nothing reads",
    ),
    "any_word_for_biases": Mutant(
        record(Sound(), config=AnyWordForBiases), "biases_train_along", "`bias` takes `some`"
    ),
    "biases_by_another_name": Mutant(record(Sound(), config=BiasesByAnotherName), "biases_train_along", "mutant_only"),
    "by_length": Mutant(
        replace(SOUND_AROUND, tuner=ByLength()),
        "generation_with_a_cache_is_the_same",
        "generated with a cache",
        "sound_around",
    ),
    "keeps_the_view": Mutant(
        replace(SOUND_AROUND, tuner=KeepsTheView()), "method_is_stateless", "changed its attributes", "sound_around"
    ),
    "unfreezes_the_module": Mutant(
        replace(SOUND_AROUND, tuner=UnfreezesTheModule()), "gradients_in_slots_only", "too much", "sound_around"
    ),
    "one_slot_short": Mutant(
        replace(SOUND_AROUND, tuner=OneSlotShort()), "gradients_in_slots_only", "lacks", "sound_around"
    ),
    "short_prompt": Mutant(
        replace(SOUND_PROMPT, tuner=ShortPrompt()), "saving_and_loading_is_exact", "another shape", "sound_prompt"
    ),
}


#: Functions of a tuner that the core calls, each replaced by one that raises.
FUNCTIONS: tuple[str, ...] = ("slots", "init", "scaling", "dropout", "check", *LOWERINGS)
#: The sound method that has a lowering, and none that the core would rather use.
_WITH: dict[str, type[Sound]] = {
    "branch": SoundBranch, "input": SoundScale, "output": SoundScale, "params": SoundParams,
}  # fmt: skip


def raising(function: str) -> TunerMethod:
    """The sound method with one function that raises."""

    def fail(self: object, *args: object) -> None:
        raise ZeroDivisionError("on purpose")

    fail.__name__ = function
    fail.__code__ = fail.__code__.replace(co_name=function)
    cls: Callable[[], MapTuner[Any]] = type("Raising", (_WITH.get(function, Sound),), {function: fail})
    return record(cls())


@hookimpl
def peftc_tuner() -> TunerMethod:
    name = os.environ[CHOICE]
    if name.startswith("raising_"):
        return raising(name.removeprefix("raising_"))
    return SOUND_METHODS[name] if name in SOUND_METHODS else MUTANTS[name].method
