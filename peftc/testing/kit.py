"""All checks, on which subjects each is run, and running them: as cases for pytest, or at once into a report.

A case stands alone: it builds its models anew, so cases can be run in any order and in parallel. Only plans made in another
process are shared, for all methods of a run are planned by one.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import ModuleType

from peftc import rules
from peftc.config.mixins import TargetsMixin
from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean
from peftc.registry.boundary import boundary
from peftc.registry.doors import Record, name_of, record_of
from peftc.registry.manager import default_registry
from peftc.registry.starts import default_starts
from peftc.registry.storages import default_storages
from peftc.testing.cells import Row, all_rows, rows
from peftc.testing.checks import (
    calls,
    cells,
    declared,
    effect,
    features,
    gradients,
    lifecycle,
    modules,
    packed,
    planning,
    prompts,
    states,
    used,
)
from peftc.testing.elsewhere import Planned, label_of, plan_elsewhere
from peftc.testing.packed import PackedModel, known_to, packed_subjects
from peftc.testing.report import Finding, Report, broken
from peftc.testing.subjects import Subject, quiet, subjects
from peftc.tuner.method import TunerMethod
from peftc.tuner.prompt import PromptTuner
from peftc.tuner.start import Start
from peftc.tuner.storage import Storage
from peftc.tuner.variant import Variant

When = Callable[[Subject], bool]


def everywhere(s: Subject) -> bool:
    """On every subject."""
    return True


def on_layers(s: Subject) -> bool:
    """Methods that change layers."""
    return s.method.adapts_layers


def in_weights(s: Subject) -> bool:
    """Methods that can be folded into weights."""
    return s.merges


def without_base_weights(s: Subject) -> bool:
    """Methods that work on a base whose weights have no content."""
    return not s.rebases


def for_each_row(s: Subject) -> bool:
    """Methods that change layers, and leave the base as it is."""
    return s.method.adapts_layers and not s.rebases


def on_features(s: Subject) -> bool:
    """Methods that act on each token by itself."""
    return s.method.adapts_layers and not s.values


def in_weights_that_change(s: Subject) -> bool:
    """The first options of those, where packed weights can be others."""
    return s.first and in_weights(s) and isinstance(s.model, PackedModel) and not s.model.storage.unwritable


def for_each_row_of_the_first(s: Subject) -> bool:
    """The first options of methods that change layers."""
    return s.first and for_each_row(s)


def in_the_model(s: Subject) -> bool:
    """Methods that need no wrapper round the model."""
    return not s.method.is_prompt and s.method.call_tuner is None


def around_modules(s: Subject) -> bool:
    """Methods that act around whole modules."""
    return s.method.module_tuner is not None


def around_modules_of_blocks(s: Subject) -> bool:
    """Those on models that generate."""
    return around_modules(s) and on_blocks(s)


def without_a_merged_form(s: Subject) -> bool:
    """Methods that do not change weights."""
    return not s.merges


def first_options(s: Subject) -> bool:
    """The first options on every model."""
    return s.first


def once(s: Subject) -> bool:
    """The first options on one model: what depends on the method alone."""
    return s.foremost


def on_experts(s: Subject) -> bool:
    """Single parameters that hold the weights of experts."""
    return bool(s.parameters)


def once_with_targets(s: Subject) -> bool:
    """The same, of methods that are told which modules to adapt."""
    return once(s) and on_layers(s) and issubclass(s.method.config, TargetsMixin)


def on_few_layers(s: Subject) -> bool:
    """The first options of methods that change layers, on small models."""
    return s.first and on_layers(s) and not s.model.is_language_model


def from_graphs(s: Subject) -> bool:
    """Models that another process knows by their graph."""
    return s.model.base is None


def as_prompt(s: Subject) -> bool:
    """Methods that change the model's call."""
    return s.method.is_prompt


def in_cache(s: Subject) -> bool:
    """Methods that add keys and values."""
    return isinstance(s.method.tuner, PromptTuner) and s.method.tuner.place.is_cache


def with_the_models_loss(s: Subject) -> bool:
    """Prompt methods that leave the loss to the model."""
    return isinstance(s.method.tuner, PromptTuner) and type(s.method.tuner).loss is PromptTuner.loss


def on_blocks(s: Subject) -> bool:
    """Models whose blocks can be checkpointed, with what checkpointing does not drop."""
    return s.model.is_language_model and not in_cache(s)


def in_float64(s: Subject) -> bool:
    """Models that compute in float64 throughout, with methods whose gradients are meant to be the output's slopes."""
    return s.model.tolerance < 1e-6 and not s.bent


def quick_to_compile(s: Subject) -> bool:
    """The first options of methods that act in the model, on small models."""
    return s.first and in_the_model(s) and s.model.name in ("mlp", "conv2d", "embedding")


#: Every check, with the subjects that it is run on.
CHECKS: tuple[tuple[Callable[[Subject], None], When], ...] = (
    (declared.record_names_its_slots, in_the_model),
    (declared.config_survives_files, everywhere),
    (declared.compiling_leaves_the_config_alone, everywhere),
    (declared.method_is_stateless, everywhere),
    (declared.keys_follow_the_rule, everywhere),
    (used.what_is_declared_is_used, once),
    (calls.lowerings_have_their_shapes, on_layers),
    (calls.starting_leaves_the_config_alone, everywhere),
    (planning.plan_survives_json, everywhere),
    (planning.works_without_storage, without_base_weights),
    (effect.starts_as_declared, everywhere),
    (effect.acts_when_trained, everywhere),
    (effect.starts_from_the_seed, everywhere),
    (calls.calls_change_nothing, everywhere),
    (effect.disabled_is_base, everywhere),
    (effect.disabled_is_base_while_merged, in_weights),
    (effect.merged_equals_unmerged, in_weights),
    (effect.unmerging_restores, in_weights),
    (effect.merging_leaves_tensors_alone, in_weights),
    (effect.lowerings_agree, on_layers),
    (effect.combining_adds_updates, on_layers),
    (effect.any_leading_shape, on_features),
    (effect.half_precision_bases, everywhere),
    (effect.experts_change_as_layers, on_experts),
    (effect.experts_part_and_join, on_experts),
    (effect.compiles, quick_to_compile),
    (gradients.gradients_in_slots_only, everywhere),
    (gradients.gradients_are_true, in_float64),
    (gradients.a_step_changes_slots_only, everywhere),
    (gradients.checkpointing_reaches_every_slot, on_blocks),
    (lifecycle.saving_and_loading_is_exact, everywhere),
    (lifecycle.adapters_do_not_leak, everywhere),
    (lifecycle.rows_are_as_alone, for_each_row),
    (lifecycle.several_active_merge_alike, in_weights),
    (lifecycle.deleting_leaves_nothing, everywhere),
    (states.another_takes_over, once),
    (lifecycle.unloading_restores, everywhere),
    (lifecycle.copies_are_equal_and_apart, everywhere),
    (lifecycle.injected_equals_wrapped, in_the_model),
    (lifecycle.any_adapter_name, once),
    (lifecycle.failed_apply_restores, everywhere),
    (features.what_is_not_declared_is_refused, once),
    (features.other_kinds_are_refused, once_with_targets),
    (features.excluded_modules_are_left_alone, once),
    (features.patterns_reach_their_layer, once),
    (features.biases_train_along, once),
    (features.saved_modules_ride_along, once),
    (features.what_experts_cannot_is_refused, on_experts),
    (features.swapping_exchanges_values, on_few_layers),
    (features.conversion_is_exact_at_full_rank, on_few_layers),
    (features.additive_changes_do_not_read_the_weight, on_few_layers),
    (prompts.prompt_goes_before_the_input, as_prompt),
    (prompts.labels_skip_the_prompt, with_the_models_loss),
    (prompts.generation_sees_the_prompt, as_prompt),
    (prompts.merging_is_refused, without_a_merged_form),
    (prompts.checkpointing_is_refused, in_cache),
    (modules.plan_of_several_equals_model, first_options),
    (modules.one_acts_at_a_time, around_modules),
    (modules.generation_with_a_cache_is_the_same, around_modules_of_blocks),
)

#: Those that are run where single parameters are adapted: what the others hold does not depend on it, or is refused there.
ON_PARAMETERS = frozenset(
    {
        declared.record_names_its_slots,
        declared.config_survives_files,
        declared.method_is_stateless,
        declared.keys_follow_the_rule,
        planning.plan_survives_json,
        planning.works_without_storage,
        effect.starts_as_declared,
        effect.acts_when_trained,
        effect.starts_from_the_seed,
        effect.disabled_is_base,
        effect.disabled_is_base_while_merged,
        effect.merged_equals_unmerged,
        effect.unmerging_restores,
        effect.merging_leaves_tensors_alone,
        effect.half_precision_bases,
        effect.experts_change_as_layers,
        effect.experts_part_and_join,
        gradients.gradients_in_slots_only,
        gradients.gradients_are_true,
        gradients.a_step_changes_slots_only,
        lifecycle.saving_and_loading_is_exact,
        lifecycle.adapters_do_not_leak,
        lifecycle.several_active_merge_alike,
        lifecycle.deleting_leaves_nothing,
        lifecycle.unloading_restores,
        lifecycle.copies_are_equal_and_apart,
        features.what_experts_cannot_is_refused,
    }
)

#: Those that are run on packed layers: on the first options, and the last two on all.
ON_PACKED: tuple[tuple[Callable[[Subject], None], When], ...] = (
    (planning.plan_survives_json, first_options),
    (effect.disabled_is_base, first_options),
    (effect.disabled_is_base_while_merged, in_weights_that_change),
    (effect.unmerging_restores, in_weights_that_change),
    (gradients.a_step_changes_slots_only, first_options),
    (lifecycle.saving_and_loading_is_exact, first_options),
    (lifecycle.adapters_do_not_leak, first_options),
    (lifecycle.rows_are_as_alone, for_each_row_of_the_first),
    (lifecycle.deleting_leaves_nothing, first_options),
    (lifecycle.unloading_restores, first_options),
    (lifecycle.copies_are_equal_and_apart, first_options),
    (lifecycle.failed_apply_restores, first_options),
    (packed.trains_as_on_plain_layers, everywhere),
    (packed.merges_into_packed_layers, in_weights),
)

#: Checks of what another process planned. Where it had to build the model, torch was needed.
CHECKS_OF_PLANS: tuple[tuple[Callable[[Subject, Planned], None], When], ...] = (
    (planning.plan_equals_model, everywhere),
    (planning.loads_without_torch, from_graphs),
)


class Elsewhere:
    """Plans of all subjects of a run, made in another process when the first is asked for.

    Models with a config are planned in a process of their own, as building them takes long and may not be needed.
    """

    def __init__(self, subjects: Sequence[Subject], modules: dict[str, str]) -> None:
        self._subjects = subjects
        #: those of plugins that are not installed, by PEFT type
        self.modules = modules

    def __call__(self, s: Subject) -> Planned:
        plans = self._from_graphs if s.model.base is None else self._from_configs
        return plans[label_of(s)]

    @cached_property
    def _from_graphs(self) -> dict[str, Planned]:
        return plan_elsewhere([s for s in self._subjects if s.model.base is None], self.modules)

    @cached_property
    def _from_configs(self) -> dict[str, Planned]:
        return plan_elsewhere([s for s in self._subjects if s.model.base is not None], self.modules)


#: Checks of a row of the table of variants and starts.
CHECKS_OF_ROWS: tuple[Callable[[Row], None], ...] = (cells.begins_as_it_says,)


@dataclass(frozen=True)
class Case:
    """One check of one subject, or of one row of a method's table."""

    check: str
    subject: Subject | Row
    call: Callable[[], None]
    #: what the check is for, in one sentence
    promise: str = ""
    #: the name of what is checked: a PEFT type, `<peft type>.<variant>`, or a start
    of: str = ""

    def __str__(self) -> str:
        return f"{self.subject.method.peft_type}-{self.check}-{self.subject}"

    def run(self) -> None:
        """Raise `PeftcError` that says what is wrong and how to mend it, if the method fails the check."""
        __tracebackhide__ = True
        with (
            quiet(),
            known_to(self.subject),
            boundary(self.subject.method.peft_type, f"conformance check {self.check}"),
        ):
            self.call()


def cases(*plugins: str | ModuleType) -> list[Case]:
    """All cases of the methods, or of every installed one; of a variant, a start or a storage, those that it has a part in. Raises `PeftcError`
    for a plugin that cannot be loaded."""
    records = [(plugin, record_of(plugin)) for plugin in plugins or default_registry().names]
    brought = [(plugin, record) for plugin, record in records if isinstance(plugin, ModuleType)]
    modules = {
        record.peft_type: plugin.__name__ for plugin, record in brought if not isinstance(record, (Start, Storage))
    }
    concerned = [(name_of(record), *_concerned(record)) for _, record in records]
    elsewhere = Elsewhere([s for _, found, _, _ in concerned for s in found], modules)
    made = (
        (name, [*_cases(found, elsewhere), *_cases_of_rows(table), *_cases_of_packed(packed)])
        for name, found, table, packed in concerned
    )
    return [replace(case, of=name) for name, own in made for case in own]


def cases_on(storage: Storage, plugin: str | ModuleType) -> list[Case]:
    """The cases of a method, or a variant of one, on layers in a storage. Raises `PeftcError` for one that cannot be loaded."""
    record = record_of(plugin)
    if isinstance(record, Variant):
        method, examples = default_registry().get(record.peft_type).with_variant(record), record.examples
        method = replace(method, examples=examples or ({"variant": record.name},))
    elif isinstance(record, TunerMethod):
        method = record
    else:
        what = f"`{name_of(record)}` is no method, which could be checked on layers in the storage `{storage.name}`"
        raise PeftcError(rules.UNKNOWN_CHECK(what, fix="Name a PEFT type."))
    return [replace(case, of=name_of(record)) for case in _cases_of_packed(packed_subjects(method, storage))]


def _concerned(record: Record) -> tuple[Sequence[Subject], Sequence[Row], Sequence[Subject]]:
    """What a record has a part in."""
    registry = default_registry()
    if isinstance(record, Storage):
        return (), (), [s for name in registry.names for s in packed_subjects(registry.get(name), record)]
    if isinstance(record, TunerMethod):
        return subjects(record), all_rows(record), packed_subjects(record)
    if isinstance(record, Variant):
        method = registry.get(record.peft_type).with_variant(record)
        alone = replace(method, examples=record.examples or ({"variant": record.name},))
        table = rows(method, [default_starts().get(name) for name in default_starts().names])
        # what is asked once is asked of the method
        ours = [row for row in table if row.variant is record]
        return [replace(s, foremost=False) for s in subjects(alone)], ours, packed_subjects(alone)
    methods = (method for method in map(registry.get, registry.names) if method.start_option)
    return (), [row for method in methods for row in rows(method, [record]) if row.start is record], ()


def _cases(found: Sequence[Subject], elsewhere: Elsewhere) -> Iterator[Case]:
    for s in found:
        for check, when in CHECKS:
            if when(s) and (check in ON_PARAMETERS or not s.parameters):
                yield Case(check.__name__, s, partial(check, s), inspect.getdoc(check) or "")
        for of_plan, when in CHECKS_OF_PLANS:
            if when(s):
                call = partial(_check_plan, of_plan, s, elsewhere)
                yield Case(of_plan.__name__, s, call, inspect.getdoc(of_plan) or "")


def _cases_of_packed(found: Sequence[Subject]) -> Iterator[Case]:
    for s in found:
        for check, when in ON_PACKED:
            if when(s):
                yield Case(check.__name__, s, partial(check, s), inspect.getdoc(check) or "")


def _cases_of_rows(tables: Sequence[Row]) -> Iterator[Case]:
    for row in tables:
        for check in CHECKS_OF_ROWS:
            yield Case(check.__name__, row, partial(check, row), inspect.getdoc(check) or "")


def _check_plan(check: Callable[[Subject, Planned], None], s: Subject, elsewhere: Elsewhere) -> None:
    peft_type = s.method.peft_type
    if peft_type not in elsewhere.modules and not default_registry().claims_for(peft_type):
        what = f"{peft_type} is known to this process alone, and its plans are made by another"
        raise broken(what, "Put it with its hook into a file, and check that: `peftc plugins check FILE`.")
    check(s, elsewhere(s))


def all_checks() -> tuple[Callable[..., None], ...]:
    """Every check that there is."""
    return (
        *dict.fromkeys(check for check, _ in (*CHECKS, *ON_PACKED)),
        *(check for check, _ in CHECKS_OF_PLANS),
        *CHECKS_OF_ROWS,
    )


def chosen(plugin: str | ModuleType, only: Sequence[str] = (), storage: str = "") -> list[Case]:
    """The cases of one method; with `only`, of the checks of that name; with the name of a storage, those on layers in it.

    Raises `PeftcError` for a plugin that cannot be loaded, and for names of checks that this method has no case of.
    """
    found = cases_on(default_storages().get(storage), plugin) if storage else cases(plugin)
    there = list(dict.fromkeys(case.check for case in found))
    if unknown := [name for name in only if name not in there]:
        raise PeftcError([_unknown(name, there) for name in unknown])
    return [case for case in found if not only or case.check in only]


def _unknown(name: str, there: Sequence[str]) -> Diagnostic:
    known = {function.__name__ for function in all_checks()}
    what = f"`{name}` is for methods of another sort" if name in known else f"There is no check `{name}`"
    return rules.UNKNOWN_CHECK(what, fix=did_you_mean(name, there) or f"Use one of {', '.join(there)}.")


def examine(plugin: str | ModuleType, only: Sequence[str] = ()) -> Report:
    """Run the checks on a method; with `only`, those of that name. Raises as `chosen` does."""
    return report_of(chosen(plugin, only))


def report_of(found: Sequence[Case], at: Callable[[int, str], None] = lambda done, case: None) -> Report:
    """Run cases of one plugin; `at` is told how many are done, and the name of the last."""
    findings: list[Finding] = []
    for number, case in enumerate(found, start=1):
        findings += _findings(case)
        at(number, str(case))
    return Report(found[0].of, len(found), tuple(findings))


def _findings(case: Case) -> Iterator[Finding]:
    try:
        case.run()
    except PeftcError as error:
        yield Finding(case.check, str(case.subject), error.diagnostics, case.promise, _line(case, error.__cause__))


def _line(case: Case, raised: BaseException | None) -> str:
    """The line of the plugin's own file that raised."""
    if raised is None:
        return ""
    method, start = case.subject.method, case.subject.start if isinstance(case.subject, Row) else None
    parts = (
        method.config,
        type(method.tuner),
        *map(type, method.map_tuners),
        *([] if start is None else [type(start)]),
    )
    own = {getattr(sys.modules.get(part.__module__), "__file__", None) for part in parts}
    frames = [frame for frame in traceback.extract_tb(raised.__traceback__) if frame.filename in own]
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}" if frames else ""
