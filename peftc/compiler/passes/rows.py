"""The pass for rows of embeddings that train beside what a method does: which layers have them, and with which ids.

A layer whose weight is tied to the input embedding has the same rows, which are kept and saved once, as in the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peftc import rules
from peftc.compiler.passes.draft import Context, Draft, listed
from peftc.compiler.passes.homes import Homes
from peftc.compiler.passes.sites import slot_dtype
from peftc.compiler.passes.ties import asks, refuse_apart
from peftc.compiler.plan.sites import MapSite
from peftc.config.mixins import TokensMixin
from peftc.diagnostics import Collector, Diagnostic, did_you_mean
from peftc.graph.nodes import ModuleGraph, ModuleNode
from peftc.tuner.rows import ROWS_BESIDE, ROWS_MODULE, ROWS_OPTION, wrong_rows

#: What the input embedding is called in models that do not say which it is.
_USUAL_NAME = "embed_tokens"


@dataclass(frozen=True)
class _Rows:
    """Rows of one layer: their ids, why it has them, and what layers that have them together have in common."""

    node: ModuleNode
    ids: Sequence[int]
    reason: str
    share: str = ""


def train_rows(draft: Draft, context: Context) -> Draft:
    """A site for every layer of which `trainable_token_indices` names rows, and for those tied to the input embedding."""
    given = draft.config.trainable_token_indices if isinstance(draft.config, TokensMixin) else None
    if given is None:
        return draft
    found = Collector()
    where = context.where(ROWS_OPTION)
    named = given if isinstance(given, dict) else {_input_embedding(context.graph): given}
    for name, ids in named.items():
        for what in wrong_rows(ids, ROWS_OPTION):
            fix = "Give every id of a token to train once, as the tokenizer gives it."
            found.add(rules.BAD_VALUE(what, fix=fix, where=where if given is ids else context.where(ROWS_OPTION, name)))
    if not any(named.values()):
        what = f"`{ROWS_OPTION}` names no token, so that no row is trained"
        found.add(rules.NO_TOKENS(what, fix="Name tokens by their ids, or leave the option out.", where=where))
    layers = dict(_named(named, context, found))
    found.add(*_copied(layers, draft, context))
    apart = (
        refuse_apart({path: list(r.ids) for path, r in layers.items()}, context.graph, where) if asks(draft) else None
    )
    found.add(*(() if apart is None else apart.diagnostics))
    if found.errors:
        return draft.told(*found)
    homes = Homes(context)
    sites = []
    for rows in _with_tied(layers, context.graph):
        site = _site(rows, draft, context, homes, found)
        sites += [] if site is None else [site]
    return draft.but(rows=tuple(sites)).told(*found)


def _input_embedding(graph: ModuleGraph) -> str:
    return graph.model.input_embeddings or _USUAL_NAME


def _named(named: Mapping[str, Sequence[int]], context: Context, found: Collector) -> Iterator[tuple[str, _Rows]]:
    """The layers that are named, by path. As of modules to save, a name is compared letter by letter with the end of a path."""
    paths = [node.path for node in context.graph.nodes if node.path]
    for name, ids in named.items():
        nodes = [node for node in context.graph.nodes if node.path and node.path.endswith(name)]
        if not nodes:
            what = f"No module is called `{name}`, of which `{ROWS_OPTION}` names rows"
            fix = did_you_mean(name, (path.rpartition(".")[2] for path in paths)) or (
                "Name the embedding: `{name: [ids]}`."
            )
            found.add(rules.NO_ROWS(what, fix=fix, where=context.where(ROWS_OPTION)))
        for node in nodes if ids else ():
            yield node.path, _Rows(node, ids, ROWS_OPTION)


def _copied(layers: Mapping[str, _Rows], draft: Draft, context: Context) -> Iterator[Diagnostic]:
    for save in draft.saves:
        inside = [path for path in layers if f"{path}.".startswith(f"{save.path}.")]
        if inside:
            what = (
                f"The embedding layer is already marked to be trained fully: `modules_to_save` copies {listed(inside)}"
            )
            fix = f"Specify either `modules_to_save` or `{ROWS_OPTION}` for it, but not both."
            yield rules.CONTRADICTION(what, fix=fix, where=context.where(ROWS_OPTION))


def _with_tied(layers: Mapping[str, _Rows], graph: ModuleGraph) -> list[_Rows]:
    """These layers and those tied to the input embedding, in the order of the model. Tied ones that are named with ids of
    their own keep them."""
    result = dict(layers)
    main = layers.get(graph.model.input_embeddings or "")
    group = next((g for g in graph.ties if main is not None and f"{main.node.path}.weight" in g), ())
    owners = [name.removesuffix(".weight") for name in group if name.endswith(".weight")]
    if main is not None and all(list(layers[path].ids) == list(main.ids) for path in owners if path in layers):
        for path in owners:
            node = graph.by_path[path]
            reason = ROWS_OPTION if path in layers else f"tied to {main.node.path}"
            if node.facts.kind in ROWS_BESIDE.supports:
                result[path] = _Rows(node, main.ids, reason, f"rows {group[0]}")
    return [result[node.path] for node in graph.nodes if node.path in result]


def _site(rows: _Rows, draft: Draft, context: Context, homes: Homes, found: Collector) -> MapSite | None:
    """The site of a layer's rows; None, with what is wrong told, where there is none."""
    node, ids = rows.node, list(rows.ids)
    if node.facts.kind not in ROWS_BESIDE.supports or node.facts.weight is None:
        what = f"`{node.path}` is a {node.facts.cls}, which has no rows for tokens"
        fix = "Name an embedding, or a linear layer with a row for each token."
        found.add(rules.BAD_TARGET(what, fix=fix, where=context.where(ROWS_OPTION)))
        return None
    overrides = () if draft.config.trainable_token_indices == ids else ((ROWS_OPTION, ids),)  # type: ignore[attr-defined]  # of the mixin
    config = draft.config.model_copy(update=dict(overrides)) if overrides else draft.config
    problems = list(ROWS_BESIDE.check(config, node.facts, node.path))
    if problems:
        found.add(*problems)
        return None
    declared = tuple(replace(slot, share=rows.share) for slot in ROWS_BESIDE.slots(config, node.facts))
    slots = homes.found(f"{node.path}.{ROWS_MODULE}", declared)
    dtype = slot_dtype(node.facts.weight.dtype, context.options.autocast_adapter_dtype)
    return MapSite(node.path, node.facts, config, slots, dtype, rows.reason, overrides, node.role, inside=ROWS_MODULE)
