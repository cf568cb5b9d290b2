"""Adapters whose starts changed the base weights, on disk: what lies beside them says which weights they belong to.

`peftc_start.safetensors` holds what each layer's change follows from, so that nothing is decomposed again; the reference ignores
it. Turned to the original base such an adapter is one of twice the rank: `B A - B0 A0 = [B | -B0] [A ; A0]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import Tensor

from peftc import rules
from peftc.checkpoint.load import AdapterFile, open_adapter, open_weights
from peftc.checkpoint.names import START_NAME
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import Collector, Diagnostic, PeftcError, Severity, Where, warn
from peftc.registry.boundary import boundary
from peftc.registry.manager import default_registry
from peftc.registry.starts import known_start
from peftc.runtime.layer.wrapper import Source, TunerLayer
from peftc.runtime.session import starts
from peftc.runtime.session.session import Session
from peftc.tuner.start import Chosen, Reads

#: Where the factors that an adapter began with are: a folder, or with the adapter itself.
Beginning = str | PathLike[str] | bool | None


def chosen_by(config: PeftConfig) -> Chosen | None:
    """The start that a config names, if it changes the base."""
    chosen = known_start(default_registry().method_of(config), config)
    return chosen if chosen is not None and chosen.start.changes_base else None


def kept_beside(session: Session, name: str, config: PeftConfig) -> dict[str, Tensor]:
    """What is saved beside an adapter whose config names such a start."""
    return starts.kept(session, name) if chosen_by(config) is not None else {}


# loading --------------------------------------------------------------------------------------------------------------


def with_kept(plan: AdapterPlan, folder: Path, source: Source) -> Source:
    """A source of an adapter's tensors that has what was kept beside it as well.

    Without that file a start is repeated, with a warning where that gives something else. Raises `PeftcError` where it cannot
    be repeated, and for a file that does not fit.
    """
    chosen = chosen_by(plan.config)
    sites = [site for site in plan.maps if chosen is not None and chosen.acts_on(site.layer)]
    if chosen is None or not sites:
        return source
    path = folder / START_NAME
    if not path.is_file():
        _told_of_repetition(plan, chosen, folder)
        return source
    file = open_weights(path)
    problems = Collector()
    problems.add(*(problem for site in sites for problem in _misfits(site, chosen, file)))
    problems.raise_errors()

    def find(key: str) -> Tensor | None:
        return file.tensor(key) if key in file.tensors else source(key)

    return find


def _told_of_repetition(plan: AdapterPlan, chosen: Chosen, folder: Path) -> None:
    if chosen.start.repeats(chosen.argument):
        return
    option = default_registry().get(plan.peft_type).start_option
    can = chosen.start.reads is Reads.NOTHING
    what = f"`{chosen.value}` changed the base model's weights, and `{START_NAME}`, which says how, is not beside the adapter"
    if can:
        what += "; it is computed again, with other random numbers"
    fix = (
        f"Convert it where it was trained (`path_initial_model_for_weight_conversion`), or set `{option}` to `true` if the "
        "changed base was saved and is what you load."
    )
    told = rules.START_NOT_REPEATED(
        what, fix=fix, where=Where(file=str(folder)), severity=Severity.WARNING if can else None
    )
    if not can:
        raise PeftcError(told)
    warn([told])


def _misfits(site: MapSite, chosen: Chosen, file: AdapterFile) -> Iterator[Diagnostic]:
    """What of a layer's kept tensors is not there, or of another shape than its weight's factors."""
    facts = {name: file.tensors.get(site.kept_key(name)) for name in chosen.start.kept}
    where = Where(file=str(file.path), path=site.path)
    fix = "Copy the whole folder again, or delete this file, so that the start is repeated."
    lacking = [name for name, found in facts.items() if found is None]
    if lacking:
        yield rules.START_KEPT_UNFIT(f"There is no `{site.kept_key(lacking[0])}`", fix=fix, where=where)
        return
    A, B = (None if (found := facts.get(name)) is None else found.shape for name in ("A", "B"))
    if A is None or B is None:
        return
    if len(A) != 2 or len(B) != 2 or A[1] != site.layer.fan_in or B[0] != site.layer.out_features or A[0] != B[1]:
        what = f"Kept factors of the shapes {list(A)} and {list(B)} are not of {site.layer.fan_in}→{site.layer.out_features}"
        yield rules.START_KEPT_UNFIT(what, fix=fix, where=where)


def take_kept(session: Session, plan: AdapterPlan, source: Source) -> None:
    """Let an adapter that is overwritten have the changes of base weights that belong to the new values."""
    chosen = chosen_by(plan.config)
    if chosen is None:
        return
    for layer in session.layers_of(plan.name):
        rebased, site = layer.rebased, layer.site(plan.name)
        held = None if rebased is None else rebased.held.get(plan.name)
        found = {name: source(site.kept_key(name)) for name in chosen.start.kept}
        stored = {name: tensor for name, tensor in found.items() if tensor is not None}
        if held is None or len(stored) < len(found):
            continue
        if any(not torch.equal(stored[name], own.to(stored[name])) for name, own in held.kept.items()):
            layer.hold_anew(plan.name, stored)


# turning to the original base -----------------------------------------------------------------------------------------


def turned(
    session: Session, name: str, config: PeftConfig, tensors: Mapping[str, Tensor], beginning: Beginning
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter's config and tensors by checkpoint key as those of one beside the original base, of twice the rank.

    `beginning` is the folder of the adapter as it began, or true for what was kept of it. Raises `PeftcError` if the adapter is
    no product of factors, or its change of the base none.
    """
    plan, result = session.plans[name], dict(tensors)
    chosen = chosen_by(config)
    along = chosen is not None and bool(chosen.along)  # then what it began with says nothing of the base
    file = None if beginning is True else open_adapter(fspath(beginning or ""))
    wide: PeftConfig | None = None
    for layer in session.layers_of(name):
        site, tuner = layer.site(name), layer.part(name).tuner
        able = "thin" in tuner.lowerings and tuner.is_startable
        with boundary(plan.peft_type, "of_twice", site.path):
            wide, own = (tuner.of_twice(config), tuner.of_twice(site.config)) if able else (None, None)
        if wide is None or own is None:
            raise PeftcError(_no_product(plan, site.path))
        first = _first_factors(plan, layer, file) if file is not None and not along else _kept_factors(layer, name)
        with torch.no_grad():
            A, B, scale = layer.part(name).lowering("thin")(layer.part(name).view.fixed(training=False))
            A, B, usual = A.flatten(1), B.flatten(1), tuner.scaling(site.config, site.layer)
            A = A * (float(scale) / usual) if usual and float(scale) != usual else A
            first = (torch.zeros_like(A), torch.zeros_like(B)) if first is None else first
            A, B = torch.cat([A, first[0].to(A)]), torch.cat([B, -first[1].to(B)], dim=1)
            with boundary(plan.peft_type, "of_thin", site.path):
                slots = tuner.of_thin(own, site.layer, A, B)
        saved = {label: slot for label, slot in layer.part(name).slots.items() if slot.saved}
        for label, key in ((label, site.key(slot, name).disk()) for label, slot in saved.items()):
            if label in slots:
                result[key] = slots[label].to(tensors[key].dtype).contiguous()
            else:
                result.pop(key, None)
    return (wide or config), result


def _kept_factors(layer: TunerLayer, name: str) -> tuple[Tensor, Tensor] | None:
    rebased = layer.rebased
    held = None if rebased is None else rebased.held.get(name)
    if held is None:
        return None
    if not held.chosen.start.is_offset:
        what = f"`{held.chosen.value}` made of the base weight what is no low-rank change of it"
        fix = "Save it as it is: what was kept of the start lies beside it."
        raise PeftcError(rules.OTHER_WEIGHTS(what, fix=fix, where=layer.part(name).path))
    return held.kept["A"], held.kept["B"]


def _first_factors(plan: AdapterPlan, layer: TunerLayer, file: AdapterFile) -> tuple[Tensor, Tensor]:
    """The factors in the folder of an adapter as it began."""
    site, part = layer.site(plan.name), layer.part(plan.name)
    labels = part.tuner.thin_slots(site.config, site.layer)
    keys = [site.key(part.slots[label], plan.name).disk() for label in labels]
    lacking = [
        key
        for key in keys
        if key not in file.tensors or file.tensors[key].shape != part.slots[labels[keys.index(key)]].shape
    ]
    if lacking:
        what = f"The adapter as it began has no `{lacking[0]}` of this one's shape"
        fix = "Name the folder that this adapter was saved to before it was trained."
        raise PeftcError(rules.OTHER_WEIGHTS(what, fix=fix, where=Where(file=str(file.path))))
    first, second = (file.tensor(key) for key in keys)
    return first.flatten(1), second.flatten(1)


def _no_product(plan: AdapterPlan, path: str) -> Diagnostic:
    what = f"`{plan.name}` ({plan.peft_type}) on `{path}` is no product of two factors that another could be put beside"
    return rules.OTHER_WEIGHTS(what, fix="Save it as it is, or merge it into the base.", where=path)
