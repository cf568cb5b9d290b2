"""Every variant with every start on every kind of layer: what is defined does what a start must, what is not is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from peftc.diagnostics import Diagnostic, PeftcError, Severity
from peftc.graph.nodes import Kind
from peftc.model.functions.gathering import start_targets
from peftc.model.mapping import get_peft_model
from peftc.model.peft_model import PeftModel
from peftc.registry.boundary import boundary
from peftc.runtime.layer.starting import WEIGHT
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.testing.cells import Cell, Row
from peftc.testing.compare import close, different, objects_of, same, same_tensors, state_of
from peftc.testing.models import TinyModel, seeded
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, layers_of, quiet, slots_of
from peftc.tuner.start import Chosen, Reads, Start

_CORE = "Report this as a bug of peftc."
_EXACT = torch.float64
#: What rounding explains in float64, where data goes through float32.
_TOLERANCE = 1e-6


def begins_as_it_says(row: Row) -> None:
    """A start is chosen by its name alone: on each kind of layer it does what it must, with each variant, or is refused."""
    problems = [problem for model, cell in row.cells() for problem in _problems(row, model, cell)]
    if problems:
        raise PeftcError(problems)


def _problems(row: Row, model: TinyModel, cell: Cell) -> Iterator[Diagnostic]:
    try:
        with boundary(row.method.peft_type, f"conformance check {begins_as_it_says.__name__}"):
            s = row.on(model)
            _as_declared(row, s, cell)
            if cell.codes:
                refused_as_planned(s, cell)
            else:
                _works(row, s, cell)
    except PeftcError as error:
        yield from (replace(told, what=f"On the kind `{model.name}`: {told.what}") for told in error.diagnostics)


def _as_declared(row: Row, s: Subject, cell: Cell) -> None:
    """No kind is adapted that the mathematics, or the start, does not name."""
    if cell.codes:
        return
    chosen, kinds = row.chosen, _kinds_in(s)
    tuners = row.method.own_tuners if row.variant is None else row.variant.tuners
    strange = kinds - frozenset(kind for tuner in tuners for kind in tuner.supports)
    fix = "Add the kind to `supports` or `kinds`, or let nothing else choose mathematics for it."
    if strange:
        raise broken(f"It is adapted, and the mathematics does not name it: {', '.join(sorted(strange))}", fix)
    others = frozenset() if chosen is None else kinds - chosen.start.kinds
    if chosen is not None and others and not chosen.start.spares_others:
        raise broken(f"It begins by `{chosen.value}`, which does not name it: {', '.join(sorted(others))}", fix)
    if chosen is not None and others and not cell.spared:
        raise broken(f"That it begins as without `{chosen.value}` is not told", _CORE)


def _kinds_in(s: Subject) -> frozenset[Kind]:
    """The kinds that the one layer comes to; attention is made of two."""
    graph = s.model.graph
    if s.parameters:
        return frozenset({Kind.EXPERTS})
    kind = graph.by_path["lin0"].facts.kind
    return frozenset({Kind.EXPERTS, Kind.LINEAR} if kind is Kind.ATTENTION else {kind})


def refused_as_planned(s: Subject, cell: Cell) -> None:
    """The same rules as in the plan, and the model is as it was."""
    model = s.build()
    state, objects = state_of(model), objects_of(model)
    try:
        with quiet():
            get_peft_model(model, s.config())
    except PeftcError as error:
        errors = {problem.code for problem in error.diagnostics if problem.severity is Severity.ERROR}
        if tuple(sorted(errors)) != cell.codes:
            raise broken(
                f"It is refused by {', '.join(sorted(errors))}, in a plan by {', '.join(cell.codes)}", _CORE
            ) from None
        same_tensors(state_of(model), state, "the model that cannot be adapted", _CORE)
        if objects_of(model) != objects:
            raise broken("Refusing leaves other modules", _CORE) from None
        return
    raise broken(f"It is adapted, and a plan refuses it by {', '.join(cell.codes)}", _CORE)


def _works(row: Row, s: Subject, cell: Cell) -> None:
    """The base's output at first, or what is declared; another after a step; the same when merged."""
    chosen = row.chosen
    if chosen is not None and _needs_other_data(chosen.start):
        return
    model = _begun(s, chosen)
    if any(layer.part("default").tuner.weighs_siblings for layer in layers_of(model).values()):
        return  # alone it does nothing
    base, start = s.output(s.build(_EXACT), _EXACT), s.output(model, _EXACT)
    if not all(slot.isfinite().all() for slot in slots_of(model, "default").values()):
        raise broken("Factors are not finite at the start", "Let the start give finite factors.")
    if _begins_as_base(s, chosen):
        fix = "Let the factors cancel, or take what they add out of the base (`changes_base`)."
        close(start, base, "The output of a fresh adapter is not the base's: it", fix, tolerance=_TOLERANCE)
    with torch.no_grad():
        _base_changes(s, model, chosen)
    with model.disable_adapter():
        same(s.output(model, _EXACT), base, "The output with the adapter disabled", _CORE)
    _step(s, model, chosen)
    y = s.output(model, _EXACT)
    different(y, start, "A training step changes nothing in the output", "Let a factor that trains get gradients.")
    if cell.merges:
        model.merge_adapter()
        fix = "Correct `changed`, or `thin`."
        close(s.output(model, _EXACT), y, "The output while merged", fix, tolerance=_TOLERANCE)


def _needs_other_data(start: Start) -> bool:
    """Whether it reads what only a helper of its own can gather."""
    return start.reads is not Reads.NOTHING and not start.can_wait and not _prepares(start)


def _prepares(start: Start) -> bool:
    return type(start).prepare is not Start.prepare


def _begun(s: Subject, chosen: Chosen | None) -> PeftModel:
    """The model with a fresh adapter; a start that reads data has read the model's inputs."""
    base, config = s.build(_EXACT), s.config()
    with quiet(), seeded(2):
        reads = chosen is not None and chosen.start.reads is not Reads.NOTHING and _prepares(chosen.start)
        if chosen is not None and reads and start_targets(base, config):
            with boundary(f"the start `{chosen.start.name}`", "prepare"):
                config = chosen.start.prepare(base, config, [s.model.arguments(_EXACT)])
        with _nan_where_empty():  # a slot that nothing fills shows, whatever was in its memory
            return get_peft_model(base, config).eval()


@contextmanager
def _nan_where_empty() -> Iterator[None]:
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _begins_as_base(s: Subject, chosen: Chosen | None) -> bool:
    approximates = chosen is not None and chosen.start.changes_base and not chosen.start.is_offset
    return s.method.identity_at_start(s.config()) and not approximates


def _begins_by(chosen: Chosen | None, layer: TunerLayer) -> Start | None:
    """The start, where the layer begins by it."""
    return chosen.start if chosen is not None and chosen.acts_on(layer.site("default").layer) else None


def _base_changes(s: Subject, model: PeftModel, chosen: Chosen | None) -> None:
    """Starts that change the base take out of the weight what the factors add. All others leave it."""
    plain = s.build(_EXACT)
    for path, layer in layers_of(model).items():
        start, part = _begins_by(chosen, layer), layer.part("default")
        for name, before in plain.get_submodule(path).named_parameters(recurse=False):
            now = layer.get_base_layer().get_parameter(name)
            if start is None or not start.changes_base or name != WEIGHT:
                same(now, before, f"`{name}` of `{path}`, which nothing is to change,", "Set `changes_base`.")
                continue
            different(now, before, f"The base weight of `{path}` is the same", "Leave `changes_base` out.")
            if _begins_as_base(s, chosen) and part.tuner.is_mergeable:
                layer.merge()
                now, what = (
                    layer.get_base_layer().get_parameter(name),
                    f"Weight and update of `{path}`, compared with before,",
                )
                close(now, before, what, "Let `changed` take out what the factors add.", tolerance=_TOLERANCE)
                layer.unmerge()


def _step(s: Subject, model: PeftModel, chosen: Chosen | None) -> None:
    """One step of plain descent; a factor that is to be frozen does not train."""
    grown = s.grown(model, _EXACT)
    for layer in layers_of(model).values():
        start, part = _begins_by(chosen, layer), layer.part("default")
        if start is not None and start.frozen:
            label = part.tuner.thin_slots(part.view.config, part.view.layer)["AB".index(start.frozen)]
            if part.view.tensors()[label].requires_grad:
                raise broken(f"`{label}` trains, and the start keeps it frozen", _CORE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in grown:
                parameter.sub_(grown[name])
