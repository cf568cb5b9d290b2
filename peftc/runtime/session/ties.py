"""Weights that a base model's config says are one: a merge that makes them two says so in the config, or is refused.

Whoever saves or loads the merged model goes by the config, keeps one of the two and loses the other, trained one or not.
Of a module that was trained whole both are meant; an adapter on one use of a weight may be meant for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import Diagnostic, PeftcError, Severity, warn
from peftc.graph.replicas import own_ties
from peftc.runtime.around.lifted import narrowed
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.journal import note
from peftc.runtime.session.session import Session


def part(session: Session, names: Sequence[str] | None) -> None:
    """Let the config no longer tie weights that merging these adapters (the active ones) parts, with a warning, if modules
    that were trained whole are what parts them; else raise `PeftcError`, with nothing changed.

    A model whose config does not tie its embeddings is not looked into: there both are kept.
    """
    names = session.active if names is None else names
    session.require(names)
    tying = [config for config in _configs(session.model) if getattr(config, "tie_word_embeddings", False)]
    ties = own_ties(session.graph) if tying else ()
    parted = [group for group in ties if _differ([_merged(session, name, names) for name in group])]
    if not parted:
        return
    if all(_is_copied(session, group, names) for group in parted):
        for config in tying:
            note(setattr, config, "tie_word_embeddings", True)
            config.tie_word_embeddings = False
        warn([parted_for_good(parted)])
        return
    raise PeftcError(lost_by_ties(parted))


def parted_for_good(groups: Sequence[Sequence[str]]) -> Diagnostic:
    """That groups of weights are no longer one, and that the config says so now."""
    what = f"{_named(groups)} are no longer one tensor; `tie_word_embeddings` of the model's config is `False` now"
    why = "One of them was trained whole: a model that ties them again is another than the adapted one."
    return rules.TIE_BROKEN(what, why=why, fix="Save the model with its config.", severity=Severity.WARNING)


def lost_by_ties(groups: Sequence[Sequence[str]]) -> Diagnostic:
    """That a merge would part groups of weights that the config says are one."""
    what = f"The config says that {_named(groups)} are one tensor; merged, they differ, and a saved model keeps only one of them"
    fix = "To keep both, set `model.config.tie_word_embeddings = False` before merging; or keep the adapter beside the model."
    return rules.TIE_BROKEN(what, fix=fix)


def _named(groups: Sequence[Sequence[str]]) -> str:
    return ", ".join(" and ".join(f"`{name}`" for name in group) for group in groups)


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configs of the model and of models inside it, and those inside of these."""
    found = {id(config): config for module in model.modules() if (config := module.__dict__.get("config")) is not None}
    for config in list(found.values()):
        text = getattr(config, "text_config", None)
        found.setdefault(id(text), text)
    yield from (config for config in found.values() if config is not None)


def _is_copied(session: Session, group: Sequence[str], names: Sequence[str]) -> bool:
    return copied_by([session.plans[name] for name in (*names, *session.merged)], group)


def copied_by(plans: Sequence[AdapterPlan], group: Sequence[str]) -> bool:
    """Whether these weights part because modules were trained whole, and no adapter is on one of them."""
    adapted = {site.path for plan in plans for site in plan.maps}
    copied = {save.path for plan in plans for save in plan.saves}
    owners = [name.rpartition(".")[0] for name in group]
    inside = [owner for owner in owners if any(f"{owner}.".startswith(f"{path}.") for path in copied)]
    return bool(inside) and adapted.isdisjoint(owners)


def _merged(session: Session, name: str, adapters: Sequence[str]) -> Tensor | None:
    """A parameter of the base model as it will be after merging."""
    for path, copy in session.copies.items():
        if name.startswith(f"{path}."):
            tail = name.removeprefix(f"{path}.")
            found = copy.of((*adapters, *session.merged)).get_parameter(tail)
            return narrowed(copy.original_module, tail, found.detach())
    path, _, tail = name.rpartition(".")
    layer, module = session.layers.get(path), session.find(path)
    if layer is not None:
        merged = [name for wrapper in layer.chain() for name in wrapper.merged_adapters]
        changed = layer.merged_parameters([name for name in adapters if name not in merged])
        if tail in changed:
            return changed[tail]
    return tensor_of(module, tail) if module is not None else None


def _differ(tensors: Sequence[Tensor | None]) -> bool:
    found = [*{id(tensor): tensor for tensor in tensors if tensor is not None and not tensor.is_meta}.values()]
    return any(not torch.equal(found[0], other) for other in found[1:])
