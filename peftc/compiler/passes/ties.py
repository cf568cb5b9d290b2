"""The passes of `ensure_weight_tying`: what is trained of one use of the embeddings' weight is trained of all.

They are one tensor in the model, and so are their copies, or the tensors of their adapters. What is saved says so by the names
of the input embedding, as in the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from peftc import rules
from peftc.compiler.passes.draft import Context, Draft, listed, option
from peftc.compiler.passes.sites import all_of, save_site
from peftc.compiler.plan.sites import MapSite, SaveSite
from peftc.config.mixins import TargetNamesMixin, TiesMixin
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import Kind, ModuleGraph
from peftc.graph.replicas import own_ties
from peftc.registry.boundary import boundary
from peftc.tuner.experts import tuner_for
from peftc.tuner.slots import Slot
from peftc.tuner.transposed import can_transpose

TIES_OPTION = "ensure_weight_tying"
_TIED = "tied"


@dataclass(frozen=True)
class _Ties:
    """The input embedding, and the other modules that have its weight."""

    main: str
    others: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (self.main, *self.others)


def asks(draft: Draft) -> bool:
    """Whether an adapter is to keep ties."""
    return isinstance(draft.config, TiesMixin) and draft.config.ensure_weight_tying


def _ties(draft: Draft, context: Context) -> _Ties | None:
    """What is tied to the input embedding, if an adapter is to keep it so."""
    main = context.graph.model.input_embeddings
    if not asks(draft) or main is None:
        return None
    group = next((group for group in own_ties(context.graph) if f"{main}.weight" in group), ())
    others = [name.removesuffix(".weight") for name in group if name.endswith(".weight")]
    return _Ties(main, tuple(path for path in others if path != main)) if len(others) > 1 else None


def name_saves(draft: Draft, context: Context) -> Draft:
    """`modules_to_save` that means a use of the embeddings' weight means the input embedding, and by it all others."""
    ties, names = _ties(draft, context), option(draft.config, "modules_to_save")
    if ties is None or not names or not any(path.endswith(tuple(names)) for path in ties.all):
        return draft
    meant = {name: [n.path for n in context.graph.nodes if n.path and n.path.endswith(name)] for name in names}
    kept = [name for name in names if not meant[name] or {*meant[name]} - {*ties.others}]
    if not ties.main.endswith(tuple(kept)):
        kept.append(ties.main)
    return draft.configured(modules_to_save=kept)


def spare_tied(draft: Draft, context: Context) -> Draft:
    """Modules that are trained whole along with the input embedding are not adapted as well."""
    ties, names = _ties(draft, context), option(draft.config, "modules_to_save")
    if ties is None or not names or not ties.main.endswith(tuple(names)):
        return draft
    reason = f"it is trained whole with `{ties.main}`, to which it is tied"
    return draft.without({path: reason for path in ties.others if path in draft.targets})


def tie_copies(draft: Draft, context: Context) -> Draft:
    """A copy of each module that is tied to a copied input embedding, whose weight is the copy's."""
    ties = _ties(draft, context)
    if ties is None or not any(save.path == ties.main for save in draft.saves):
        return draft
    saves = {save.path: save for save in draft.saves}
    for position, node in enumerate(context.graph.nodes):
        if node.path in ties.others:
            reason = f"tied to {ties.main}"
            made = save_site(context.graph, position, reason, context.options.autocast_adapter_dtype)
            saves[node.path] = replace(made, tied=(("weight", f"{ties.main}.weight"),))
    order = {node.path: position for position, node in enumerate(context.graph.nodes)}
    found = sorted(saves.values(), key=lambda save: (save.path in ties.others, order[save.path]))
    return draft.but(saves=tuple(found))


def tie_targets(draft: Draft, context: Context) -> Draft:
    """Targets that are uses of the embeddings' weight mean the input embedding; the others get its adapter."""
    ties, config = _ties(draft, context), draft.config
    if ties is None or not isinstance(config, TargetNamesMixin):
        return draft
    meant = [path for path in ties.all if path in draft.targets]
    if not meant or any(path in draft.dropped for path in ties.all):
        return draft
    entries = draft.targets[meant[0]]
    targets = {path: of for path, of in draft.targets.items() if path not in ties.others} | {ties.main: entries}
    ordered = {node.path: targets[node.path] for node in context.graph.nodes if node.path in targets}
    draft = draft.but(targets=ordered, tied=dict.fromkeys(ties.others, ties.main))
    if ties.main in meant:
        return draft
    names = config.target_modules
    if isinstance(names, str):
        return draft.configured(target_modules=rf"(?:{names}|^{re.escape(ties.main)}$)")
    alive = {entry for path, of in targets.items() if path != ties.main for entry in of}
    tied = {entry for path in meant for entry in draft.targets.get(path, ()) or entries}
    return draft.configured(target_modules={*(names or ())} - (tied - alive) | {ties.main})


def tie_maps(draft: Draft, context: Context) -> Draft:
    """A site for each module that is tied to an adapted input embedding, with the tensors of that."""
    found: list[MapSite] = []
    problems: list[Diagnostic] = []
    for path, main in draft.tied.items():
        home = next((site for site in draft.maps if site.path == main and not site.parameter), None)
        if home is None:
            continue  # it cannot be adapted, which is told
        try:
            found.append(_tied_site(path, home, draft, context))
        except PeftcError as error:
            problems += error.diagnostics
    if not found:
        return draft.told(*problems)
    maps = [replace(s, slots=found[0].slots) if s.path == found[0].tied else s for s in draft.maps]
    return draft.but(maps=(*maps, *found)).told(*problems)


def _tied_site(path: str, home: MapSite, draft: Draft, context: Context) -> MapSite:
    node, method = context.graph.by_path[path], context.method
    tuner = tuner_for(method, draft.config, context.graph.by_path[home.path])
    is_embedding = node.facts.kind is Kind.EMBEDDING
    if not is_embedding and (node.facts.kind is not Kind.LINEAR or not can_transpose(tuner)):
        what = f"`{path}` is tied to `{home.path}`, and what {method.peft_type} does there cannot be done the other way round"
        fix = f"Leave `{TIES_OPTION}` out, or the embeddings."
        raise PeftcError(rules.BAD_TARGET(what, fix=fix, where=context.where(TIES_OPTION)))
    slots = tuple(replace(s, share=_TIED, home=home.path) if s.home is None else s for s in home.slots)
    mirrors: tuple[tuple[str, str], ...] = ()
    if not is_embedding:
        with boundary(method.peft_type, "slots", path):
            usual = all_of(iter(tuner_for(method, draft.config, node).slots(home.config, node.facts)))
        mirrors = tuple(_mirrors(usual, slots))
    site = replace(home, path=path, layer=node.facts, slots=slots, role=node.role, reason=f"tied to {home.path}")
    return replace(site, tied=home.path, mirrors=mirrors)


def _mirrors(usual: tuple[Slot, ...], slots: tuple[Slot, ...]) -> Iterator[tuple[str, str]]:
    """What a layer's tensors would be called if they were its own, each with that of which it is the transpose."""
    if len(usual) == len(slots) and all(a.shape == b.shape[::-1] for a, b in zip(usual, reversed(slots), strict=True)):
        yield from ((a.dotted, b.dotted) for a, b in zip(usual, reversed(slots), strict=True))


def check_kept(draft: Draft, context: Context) -> Draft:
    """That there is something to tie, where an adapter is to keep it tied."""
    if (
        not asks(draft)
        or draft.tied
        or any(save.tied for save in draft.saves)
        or any(s.slots[0].share for s in draft.rows)
    ):
        return draft
    what = f"`{TIES_OPTION}` has no effect: "
    if _ties(draft, context) is None:
        what += "no tied modules were found in the model"
    else:
        what += "no tied modules are added in `modules_to_save`, `target_modules` or `trainable_token_indices`"
    return draft.told(rules.NOTHING_TIED(what, fix="Leave it out.", where=context.where(TIES_OPTION)))


def is_tied(site: MapSite | SaveSite, draft: Draft) -> bool:
    """Whether what is trained at a site is one with what is trained where the weight is used else."""
    if isinstance(site, SaveSite):
        return bool(site.tied) or any(tail.rpartition(".")[0] == site.path for s in draft.saves for _, tail in s.tied)
    return bool(site.tied) or site.path in draft.tied.values()


def refuse_apart(named: dict[str, list[int]], graph: ModuleGraph, where: str) -> PeftcError | None:
    """What is wrong with rows of their own of layers that are to stay tied, by path; None if nothing is."""
    for group in own_ties(graph):
        inside = {path: named[path] for path in named if f"{path}.weight" in group}
        if len({tuple(ids) for ids in inside.values()}) > 1:
            what = f"Cannot ensure weight tying: {listed(inside)} have different token indices"
            fix = f"Give them the same, or leave `{TIES_OPTION}` out."
            return PeftcError(rules.CONTRADICTION(what, fix=fix, where=where))
    return None
