"""Nothing in a record is idle: what no check ever reaches is not checked, and what nothing reads is most often misspelt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peftc import rules
from peftc.compiler.compile import compile_plan
from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean
from peftc.testing.models import MODELS
from peftc.testing.subjects import Subject, kinds_in, quiet, subjects
from peftc.tuner.experts import PerExpert
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import TunerMethod
from peftc.tuner.prompt import PromptTuner


def what_is_declared_is_used(s: Subject) -> None:
    """What a record lists is there to be used: a choice or an example that never is has passed no check."""
    method = s.method
    found = subjects(method)
    idle = [
        *_choices(method, found),
        *_examples(method, found),
        *_values(s, found),
        *_adapters(method),
        *_names(method),
    ]
    if idle:
        raise PeftcError(idle)


def _idle(what: str, fix: str) -> Diagnostic:
    return rules.NOT_CONFORMANT(what, fix=fix)


def _choices(method: TunerMethod, found: Iterable[Subject]) -> Iterator[Diagnostic]:
    """Mathematics that is chosen for no layer of any model, though there are layers of its kinds."""
    own = "tuner" if isinstance(method.tuner, tuple) else "choices"
    listed = [(f"`{own}[{place}]`", tuner) for place, tuner in enumerate(getattr(method, own))]
    listed += [(f"Mathematics of the variant `{v.name}`", tuner) for v in method.variants for tuner in v.tuners]
    there = frozenset(kind for model in MODELS for kind in kinds_in(model))
    left = {
        id(tuner): (which, tuner) for which, tuner in listed if tuner.supports & there and not tuner.weighs_siblings
    }
    for subject in found:
        if not left:
            return
        for tuner in _chosen(subject):
            left.pop(id(tuner), None)
    for which, tuner in left.values():
        what = f"{which}, a `{type(tuner).__name__}`, is chosen for no layer, with none of the `examples`"
        yield _idle(what, "Correct the function that chooses, add an example that it is chosen with, or remove it.")


def _chosen(s: Subject) -> Iterator[MapTuner[Any]]:
    """The mathematics of each adapted layer; nothing where it cannot be planned, which is told by other checks."""
    try:
        with quiet():
            plan = compile_plan(s.model.graph, {"default": s.config()})
    except PeftcError:
        return
    for site in plan.adapters[0].maps:
        tuner = site.tuner(s.method, site.config, s.model.graph)
        yield tuner.one if isinstance(tuner, PerExpert) else tuner


def _examples(method: TunerMethod, found: Iterable[Subject]) -> Iterator[Diagnostic]:
    """Examples for which there is no place on any model."""
    run = [subject.options for subject in found]
    for options in method.examples:
        if options not in run:
            what = f"The example {dict(options)} is run on no model: with it the method finds nothing to adapt"
            yield _idle(what, "Correct its options, or remove it.")


def _values(s: Subject, found: Sequence[Subject]) -> Iterator[Diagnostic]:
    """Values for calls that nothing reads, and keywords that get none."""
    tuner = s.method.tuner
    tuners = s.method.map_tuners or ((tuner,) if isinstance(tuner, PromptTuner) else ())
    read = {name for own in tuners for name in own.keywords}
    given = {name for one in found for name in s.method.example_values(one.config(), 2)}
    for name in sorted(given - read):
        hint = did_you_mean(name, read - given) or "Add it to the tuner's `keywords`, or leave it out."
        yield _idle(f"`example_values` gives `{name}`, which nothing reads", hint)
    for name in sorted(read - given) if s.method.adapts_layers else ():
        yield _idle(
            f"The keyword `{name}` is never given: `example_values` has none", "Give it one value for each row."
        )


def _adapters(method: TunerMethod) -> Iterator[Diagnostic]:
    if method.example_adapters and method.call_tuner is None:
        what = "`example_adapters` are for methods that weigh other adapters, which this one does not"
        yield _idle(what, "Remove them.")


def _names(method: TunerMethod) -> Iterator[Diagnostic]:
    """Names of options that the config does not have."""
    options = set(method.config.model_fields)
    for place, names in _named(method).items():
        for name in sorted(set(names) - options):
            hint = did_you_mean(name, options) or "Name an option of the config, or remove it."
            yield _idle(f"`{place}` names `{name}`, which is no option of `{method.config.__name__}`", hint)


def _named(method: TunerMethod) -> Mapping[str, Iterable[str]]:
    """Where a method names options, and which."""
    return {
        "alike": method.alike,
        "layer_options": method.layer_options.values(),
        "default_targets": method.default_targets,
        "pattern_options": {*method.config.pattern_options, *method.config.pattern_options.values()},
        "step_options": {name for tuner in method.map_tuners for name in tuner.step_options},
    }
