"""What acts on one weight together: adapters that cannot, and layers that have one weight and keep it when they are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import torch

from peftc import rules
from peftc.compiler.passes.draft import listed
from peftc.compiler.passes.modules import TunerOf, together
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import ModuleGraph
from peftc.runtime.bases.places import share_brought
from peftc.runtime.journal import keep_entry
from peftc.runtime.layer.wrapper import TunerLayer


def refuse_clashes(plans: Sequence[AdapterPlan], tuner_of: TunerOf) -> None:
    """Raise `PeftcError` if these adapters cannot act at the same time."""
    clashes = tuple(together(plans, tuner_of))
    if clashes:
        raise PeftcError(clashes)


def refuse_around(plans: Sequence[AdapterPlan]) -> None:
    """Raise `PeftcError` if one of the adapters is no change of weights."""
    if any(plan.prompt is not None for plan in plans):
        refuse_prompts()
    around = next((plan for plan in plans if plan.modules), None)
    if around is not None:
        what = f"`{around.name}` acts around modules, such as `{around.modules[0].path}`"
        raise PeftcError(rules.CANNOT_MERGE(what, fix="Keep the adapter beside the model."))
    weighs = next((plan for plan in plans if plan.call is not None), None)
    if weighs is not None:
        what = f"`{weighs.name}` weighs adapters anew in every call"
        raise PeftcError(rules.CANNOT_MERGE(what, fix="Keep the adapter beside the model."))


def refuse_prompts() -> NoReturn:
    """Raise the `PeftcError` for virtual tokens that are to be merged."""
    fix = "Keep the adapter beside the model."
    raise PeftcError(rules.CANNOT_MERGE("A prompt changes the input, not the weights", fix=fix))


def gained(layers: Mapping[str, TunerLayer]) -> Iterator[Diagnostic]:
    """What to say of layers that have a bias only because an adapter was merged into them."""
    paths = [path for path, layer in layers.items() if any(wrapper.gained for wrapper in layer.chain())]
    if paths:
        what = f"{listed(paths)}: the layer had no bias, and has one now"
        fix = "Use the merged model as it is, or keep the adapter beside it; what is saved of it does not load as a whole."
        yield rules.BIAS_GAINED(what, fix=fix, where=paths[0])


def keep_ties(graph: ModuleGraph, layers: Mapping[str, TunerLayer]) -> None:
    """Make one of merged weights that are tied in the base model and came out alike, so that they stay tied."""
    for group in graph.ties:
        owners = [layers[path].get_base_layer() for name in group if (path := name.rpartition(".")[0]) in layers]
        tails = {name.rpartition(".")[2] for name in group}
        if len(owners) < len(group) or len(tails) > 1:
            continue
        (tail,) = tails
        share_brought(owners, tail)
        first, *others = (owner._parameters[tail] for owner in owners)
        apart = [other for other in others if other is not first]
        if first is None or not apart or any(other is None or other.is_meta for other in (first, *apart)):
            continue
        if all(other is not None and torch.equal(first, other) for other in apart):
            for owner in owners:
                keep_entry(owner._parameters, tail)
                owner._parameters[tail] = first


def merged_already(again: Sequence[str], wanted: Sequence[str], undo: str) -> Diagnostic:
    """That some adapters, or all that are to be merged, are; the method `undo` takes them out."""
    told = ", ".join(f"`{name}`" for name in again)
    what = "All adapters are already merged, nothing to do" if set(again) == set(wanted) else "Merged already"
    return rules.ALREADY_MERGED(f"{what}: {told}", fix=f"Leave the call out; `{undo}()` takes them out.")
