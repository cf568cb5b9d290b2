"""What a load would do, before it is done: every planned tensor matched with the file's header, and every difference named.

No tensor is read here, but for two that should be one. A load without any effect and tensors of another shape are errors; missing and left-over tensors
are warnings, as the reference goes on then too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from peftc import rules
from peftc.checkpoint.keys import Nearest, assign, common_change, listed, one_of_each
from peftc.checkpoint.named import assign_planned
from peftc.checkpoint.names import PLAN_NAME
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.config.reader import read_bytes
from peftc.diagnostics import Collector, Diagnostic, PeftcError, Severity, Where, warn
from peftc.graph.nodes import ModelFacts, model_from_json
from peftc.graph.tensors import TensorFacts
from peftc.limits import MAX_PLAN
from peftc.registry.boundary import boundary
from peftc.registry.manager import default_registry

if TYPE_CHECKING:
    from peftc.checkpoint.load import AdapterFile


@dataclass(frozen=True, slots=True)
class Misfit:
    """A tensor that is there with another shape than the adapter's."""

    key: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    #: the adapter's own key for it
    planned: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"`{self.key}` is {self.found} in the file and {self.expected} in the adapter"


@dataclass(frozen=True)
class LoadReport:
    """The outcome of matching: `sources` maps each planned checkpoint key to the key in the file that fills it.

    `copies` are keys of the file that hold a tensor once more, each with the key that is loaded; those of them that differ are
    `strays`. `missing` are planned keys, `unexpected` keys of the file. `carried` are those of `sources` that replace tensors of the
    base model itself. `diagnostics` says the same in words.
    """

    sources: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misfits: tuple[Misfit, ...] = ()
    carried: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    strays: tuple[str, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether every planned tensor is filled and every tensor of the file is used, under its own name."""
        return not self.diagnostics

    @property
    def missing_keys(self) -> list[str]:
        """`missing`, by the name that torch's own load result has for it."""
        return list(self.missing)

    @property
    def unexpected_keys(self) -> list[str]:
        """`unexpected`, by the name that torch's own load result has for it."""
        return list(self.unexpected)

    def require(self) -> LoadReport:
        """Raise `PeftcError` with everything found if any of it is an error; show it as warnings otherwise."""
        found = Collector()
        found.add(*self.diagnostics)
        found.raise_errors(PeftcError)
        warn(found.warnings)
        return self


def expected_tensors(plan: AdapterPlan) -> dict[str, TensorFacts]:
    """Every tensor that the adapter's checkpoint holds, by key."""
    expected = {
        parameter.disk: TensorFacts(parameter.shape, parameter.dtype)
        for parameter in (*plan.parameters(), *plan.buffers())
        if parameter.disk is not None
    }
    for save in plan.saves:
        expected |= {f"{plan.root}{save.path}.{tail}": facts for tail, facts in save.buffers}
    if plan.prompt is not None:  # what is saved are the embeddings, whatever the encoder's own tensors are
        expected |= plan.prompt.stored
    return expected


def base_tensors(plan: AdapterPlan) -> dict[str, TensorFacts]:
    """Tensors of adapted base layers, by key. A checkpoint may carry them: vocabulary layers are saved whole, for example."""
    planned = {parameter.disk for parameter in plan.parameters() if parameter.base}
    tensors = {
        f"{plan.root}{site.owner}.base_layer.{name}": facts
        for site in plan.maps
        for name, facts in site.layer.params.items()
    }
    return {key: facts for key, facts in tensors.items() if key not in planned}


def match(
    plan: AdapterPlan,
    found: Mapping[str, TensorFacts],
    *,
    file: str | None = None,
    model: ModelFacts | None = None,
    trained_on: ModelFacts | None = None,
    vocabulary: Mapping[str, TensorFacts] = MappingProxyType({}),
    ignore_mismatched_sizes: bool = False,
    same: Callable[[str, str], bool] | None = None,
) -> LoadReport:
    """Match a planned adapter with the header of a checkpoint.

    `vocabulary` are the base model's embeddings by key: a checkpoint may carry them, resized ones for example. With
    `ignore_mismatched_sizes` a tensor of another shape is left out with a warning. `same` says whether two tensors of the
    checkpoint are equal, asked for those that are stored once more for a layer with tied weights.

    `file` is named in the diagnostics. `model` is the base that it is loaded onto, `trained_on` the one that it was made
    for (from the plan saved with it), both only to say where a difference comes from.
    """
    expected = expected_tensors(plan)
    assigned = assign_planned(plan, expected, found)
    copies = _copies(plan, found, assigned)
    missing = tuple(key for key in expected if key not in assigned)
    used = {*assigned.values(), *copies, *assign(plan.mirrors(), found, plan.root).values()}
    left = [key for key in found if key not in used]
    base = {**base_tensors(plan), **vocabulary} if left else {}
    carried = assign(base, left, plan.root)
    expected |= {key: base[key] for key in carried}
    assigned |= carried
    misfits = tuple(
        Misfit(source, expected[key].shape, found[source].shape, key)
        for key, source in assigned.items()
        if expected[key].shape != found[source].shape
    )
    wrong = {misfit.key for misfit in misfits}
    sources = {key: source for key, source in assigned.items() if source not in wrong}
    base_keys = set(carried.values())
    unexpected = tuple(key for key in left if key not in base_keys)
    differs = (copy for copy, own in copies.items() if found[copy] != found[own] or (same and not same(copy, own)))
    own_carried = tuple(key for key in carried if key in sources)
    report = LoadReport(sources, missing, unexpected, misfits, own_carried, copies, tuple(differs))
    where = Where(file=file)
    shapes = [_shapes_differ(report, vocabulary, ignore_mismatched_sizes, where)] if misfits else []
    if trained_on is not None and any(misfit.planned in vocabulary for misfit in misfits):  # told in `shapes`
        trained_on = replace(trained_on, dims={k: v for k, v in trained_on.dims.items() if k != "vocab_size"})
    starts = _starts_needed(plan, report)
    diagnostics = [*shapes, *_findings(report, where), *starts, *_another_base(report, model, trained_on, where)]
    return replace(report, diagnostics=tuple(diagnostics))


def _copies(plan: AdapterPlan, found: Mapping[str, TensorFacts], assigned: dict[str, str]) -> dict[str, str]:
    """Keys of the checkpoint that hold a tensor once more, each with the key that is loaded. A tensor that is only there as
    such a copy is assigned to its own key."""
    planned = plan.copies()
    copies = {}
    for copy, source in assign(planned, found, plan.root).items():
        loaded = assigned.setdefault(planned[copy], source)
        if loaded != source:
            copies[source] = loaded
    return copies


def match_file(
    plan: AdapterPlan,
    file: AdapterFile,
    model: ModelFacts | None = None,
    vocabulary: Mapping[str, TensorFacts] = MappingProxyType({}),
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """`match` with a file that was opened, and the plan that lies beside it if there is one."""
    ask = partial(
        match,
        plan,
        file.tensors,
        file=str(file.path),
        vocabulary=vocabulary,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        same=file.equal,
    )
    report = ask()
    return report if report.is_clean else ask(model=model, trained_on=base_of(file.folder))


def base_of(folder: Path) -> ModelFacts | None:
    """The base model that an adapter was made for, by the plan saved with it; None if there is none that can be read.

    It only explains differences, so a plan that is damaged is no problem of its own here.
    """
    try:
        return model_from_json(json.loads(read_bytes(str(folder / PLAN_NAME), MAX_PLAN))["model"])
    except (PeftcError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _findings(report: LoadReport, where: Where) -> Iterable[Diagnostic]:
    if not report.misfits and len(report.sources) == len(report.carried):
        yield _without_effect(report, where)
        return
    if report.missing:
        hint = _nearest(report.missing, report.unexpected)
        yield rules.KEYS_MISSING(
            f"{_count(len(report.missing))} not in the file: {listed(report.missing)}{hint}",
            fix="Load it with the config that it was saved with; if the file was saved by a sharded run, gather it first.",
            where=where,
        )
    if report.unexpected:
        hint = _nearest(report.unexpected, report.missing or tuple(report.sources))
        yield rules.KEYS_UNEXPECTED(
            f"{_count(len(report.unexpected))} left out: {listed(report.unexpected)}{hint}",
            fix="Load it with the config that it was saved with, onto the model that it was saved from.",
            where=where,
        )
    for stray in report.strays:
        own = report.copies[stray]
        what = f"`{stray}` differs from `{own}`, though they are one tensor here, as the layers' weights are tied"
        fix = f"`{own}` was loaded. If both were trained, load them onto a base model whose weights are not tied."
        yield rules.KEYS_UNEXPECTED(f"{what}; it is left out", fix=fix, where=where)
    renamed = {source: key for key, source in report.sources.items() if source != key}
    if renamed:
        source, key = next(iter(renamed.items()))
        yield rules.KEYS_RENAMED(
            f"{_count(len(renamed))} in the file under another name, such as `{source}` for `{key}`",
            fix="They were loaded; save the adapter again to have the usual names.",
            where=where,
        )


def _starts_needed(plan: AdapterPlan, report: LoadReport) -> Iterable[Diagnostic]:
    """How the adapter would start is judged after all where some of it would."""
    slots = {site.key(slot, plan.name).disk() for site, slot in plan.slots()}
    if slots.isdisjoint(report.missing) or len(report.sources) == len(report.carried):
        return ()
    method = default_registry().get(plan.peft_type)
    with boundary(plan.peft_type, "check_start"):
        return tuple(method.check_start(plan.config))


def _shapes_differ(
    report: LoadReport, vocabulary: Mapping[str, TensorFacts], ignored: bool, where: Where
) -> Diagnostic:
    kinds = set(one_of_each(misfit.key for misfit in report.misfits)[:8])
    examples = "; ".join(str(misfit) for misfit in report.misfits if misfit.key in kinds)
    keys = listed(misfit.key for misfit in report.misfits)
    rows = {misfit.found[0] for misfit in report.misfits if misfit.planned in vocabulary and misfit.found}
    if ignored:
        fix = "They were left out, as you asked."
    elif len(rows) == 1:
        fix = (
            f"The vocabulary was resized when it was trained: call `model.resize_token_embeddings({rows.pop()})` first."
        )
    else:
        fix = "Load it onto the base model that it was trained on, with the config that it was saved with."
    what = f"{_count(len(report.misfits))} of another shape: {keys}. {examples}"
    return rules.SHAPES_DIFFER(what, fix=fix, where=where, severity=Severity.WARNING if ignored else None)


def _without_effect(report: LoadReport, where: Where) -> Diagnostic:
    if not report.unexpected:
        return rules.NOTHING_LOADS("The file holds no tensor", fix="Save the adapter again.", where=where)
    nearest = Nearest(report.missing)
    pairs = {key: near for key in report.unexpected if (near := nearest(key)) is not None}
    change = common_change(pairs) if len(pairs) == len(report.unexpected) else None
    if change is not None:
        hint = f"In every key the file has `{change[0]}` where this adapter has `{change[1]}`: load it onto the same model class."
    else:
        hint = "Load it onto the base model that it was trained on, with the config that it was saved with."
    what = f"None of the {len(report.unexpected)} tensors has a place: the file has {listed(report.unexpected, 4)}"
    return rules.NOTHING_LOADS(f"{what}; the adapter has {listed(report.missing, 4)}", fix=hint, where=where)


def _another_base(
    report: LoadReport, model: ModelFacts | None, trained_on: ModelFacts | None, where: Where
) -> Iterable[Diagnostic]:
    if model is None or trained_on is None:
        return
    told: list[tuple[str, object, object]] = [
        ("class", trained_on.cls, model.cls),
        ("model type", trained_on.model_type, model.model_type),
    ]
    told += [(name, size, model.dims[name]) for name, size in trained_on.dims.items() if name in model.dims]
    differ = [f"{name} `{before}` against `{now}`" for name, before, now in told if before != now]
    if not differ:
        return
    names = f"`{trained_on.name_or_path or trained_on.cls}`, not on `{model.name_or_path or model.cls}`"
    yield rules.OTHER_BASE(
        f"The adapter was trained on {names}: {', '.join(differ)}",
        fix=f"Load it onto `{trained_on.name_or_path or trained_on.cls}`, or train a new one for this model.",
        where=where,
    )


def _nearest(keys: Iterable[str], candidates: Iterable[str]) -> str:
    """A clause naming what one key of each kind is most like."""
    nearest = Nearest(candidates)
    pairs = [(key, near) for key in one_of_each(keys)[:4] if (near := nearest(key)) is not None]
    return "".join(f"; nearest to `{key}` is `{near}`" for key, near in pairs)


def _count(number: int) -> str:
    return f"{number} tensor is" if number == 1 else f"{number} tensors are"
