"""The table of a method: each variant of its mathematics with each start, on each kind of layer. A row has the options that
choose the two, a cell what the compiler says to them on a layer of that kind.

Variants and starts are those that the registry's doors know, a stranger's too. `docs/variants.md` shows the table,
`peftc.testing.checks.cells` holds every cell to what happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftc import rules
from peftc.compiler.compile import compile_plan
from peftc.diagnostics import PeftcError, Severity
from peftc.registry.manager import default_registry
from peftc.registry.starts import default_starts, start_of
from peftc.testing.models import KINDS, TinyModel
from peftc.testing.subjects import Subject, quiet
from peftc.tuner.method import TunerMethod
from peftc.tuner.start import Chosen, Start
from peftc.tuner.variant import Variant


@dataclass(frozen=True)
class Row:
    """A variant of a method, none for its own mathematics, and how its factors begin: the value of the option for that."""

    method: TunerMethod
    variant: Variant[Any] | None
    value: bool | str
    options: Mapping[str, Any]
    #: the start that the value names, or that of the variant
    start: Start | None = None

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.options.items())

    @property
    def chosen(self) -> Chosen | None:
        """The start, if it is one. Raises `PeftcError`."""
        return start_of(self.method, self.on(KINDS[0]).config())

    def on(self, model: TinyModel) -> Subject:
        """These options on the layer of one of the models of kinds."""
        targets = () if model.parameters else ("lin0",)
        return Subject(self.method, self.options, model, targets, parameters=model.parameters)

    def cells(self) -> Iterator[tuple[TinyModel, Cell]]:
        """What the compiler says on each kind."""
        return ((model, cell_of(self.on(model))) for model in KINDS)


@dataclass(frozen=True)
class Cell:
    """What the compiler says: codes of the rules that refuse it; else whether the layer, or a part of it, begins as without the
    start, and whether the update can be folded into its weight."""

    codes: tuple[str, ...] = ()
    spared: bool = False
    merges: bool = False


def cell_of(s: Subject) -> Cell:
    """The cell of a row's options on a model."""
    try:
        with quiet():
            plan = compile_plan(s.model.graph, {"default": s.config()})
    except PeftcError as error:
        errors = (problem.code for problem in error.diagnostics if problem.severity is Severity.ERROR)
        return Cell(tuple(sorted(set(errors))))
    assert plan.graph is not None
    tuners = [site.tuner(s.method, site.config, plan.graph) for site in plan.adapters[0].maps]
    spared = any(told.code == rules.START_SPARED.code for told in plan.warnings)
    return Cell(spared=spared, merges=all(tuner.is_mergeable for tuner in tuners))


def rows(method: TunerMethod, starts: Iterable[Start], variants: Iterable[Variant[Any]] = ()) -> tuple[Row, ...]:
    """The rows of a method with its own variants and these of others: none if it has no variants, and no option that names a
    start."""
    for variant in variants:
        if variant.peft_type == method.peft_type:
            method = method.with_variant(variant)
    return tuple(_rows(method, tuple(starts))) if method.variants or method.start_option else ()


def all_rows(method: TunerMethod) -> tuple[Row, ...]:
    """The same with all starts and variants that the doors know. Raises `PeftcError` for one that cannot be loaded."""
    door, own = default_registry().variants, f"{method.peft_type.lower()}."
    brought = [door.get(key) for key in door.names if key.startswith(own)]
    return rows(method, [default_starts().get(name) for name in default_starts().names], brought)


def _rows(method: TunerMethod, starts: Sequence[Start]) -> Iterator[Row]:
    for variant in (None, *method.variants):
        options = dict(_choosing(method, variant))
        if not method.start_option or (variant is not None and variant.start is not None):
            yield Row(method, variant, True, options, None if variant is None else variant.start)
            continue
        plain: tuple[bool | str, ...] = (True, False, *method.own_starts)
        for value in plain:
            yield Row(method, variant, value, {**options, method.start_option: value})
        for start in starts:
            needed = {name: value for name, value in start.needs.items() if name in method.config.model_fields}
            for argument in start.arguments:
                named = Chosen(start, argument).value
                yield Row(method, variant, named, {**options, method.start_option: named, **needed}, start)


def _choosing(method: TunerMethod, variant: Variant[Any] | None) -> Mapping[str, Any]:
    """Options of an example that leads to the variant."""
    if variant is None:
        return next(iter(method.examples), {})
    return next(iter(variant.examples), variant.chosen_by or {"variant": variant.name})
