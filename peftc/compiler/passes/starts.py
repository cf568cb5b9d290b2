"""What a start means for a plan: factors that do not train, layers that it is not defined on, base weights that change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from peftc import rules
from peftc.compiler.passes.draft import Context, Draft, listed
from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic
from peftc.graph.nodes import LayerFacts
from peftc.registry.boundary import boundary
from peftc.registry.starts import known_start
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot, labelled
from peftc.tuner.start import Chosen, Reads


def settled(
    chosen: Chosen, tuner: MapTuner[Any], config: PeftConfig, layer: LayerFacts, slots: tuple[Slot, ...]
) -> tuple[Slot, ...]:
    """A layer's slots, without training for the factor that the start keeps frozen."""
    if not chosen.start.frozen or not chosen.acts_on(layer):
        return slots
    label = tuner.thin_slots(config, layer)["AB".index(chosen.start.frozen)]
    held = labelled(slots).get(label)
    return tuple(replace(slot, trainable=False) if slot is held else slot for slot in slots)


def problems(
    chosen: Chosen, tuner: MapTuner[Any], config: PeftConfig, layer: LayerFacts, path: str, context: Context
) -> Iterator[Diagnostic]:
    """What is wrong with the start on a layer; where all is loaded, only what it would do there."""
    method, option = context.method, context.method.start_option
    if chosen.start.changes_base and tuner.waits:
        what = f"{chosen.said(option)} changes the weight of `{path}`, for all tokens, and the update acts for some"
        fix = f"{chosen.otherwise(option).capitalize()}, so that the base is left as it is."
        yield rules.START_UNFIT(what, fix=fix, where=path)
    if chosen.start.changes_base and layer.packed is not None and chosen.acts_on(layer):
        what = f"{chosen.said(option)} changes the weight of `{path}`, which is packed ({layer.packed.storage})"
        fix = f"Load the base model unquantised, or {chosen.otherwise(option)}."
        yield rules.START_UNFIT(what, fix=fix, where=path)
        return
    if context.options.loading:
        return
    if not (tuner.is_startable or chosen.along) and chosen.acts_on(layer):
        what = f"{method.peft_type} makes no slots of thin factors on `{path}`, which `{option}: {chosen.value}` gives"
        fix = f"Leave such layers out (`exclude_modules`), or choose another `{option}`."
        yield rules.START_UNFIT(what, fix=fix, where=path)
        return
    label = tuner.thin_slots(config, layer)[0] if chosen.acts_on(layer) else ""
    rank = labelled(tuner.slots(config, layer))[label].shape[0] if label else 0
    scaling = tuner.scaling(config, layer)
    if chosen.start.changes_base and chosen.acts_on(layer) and scaling <= 0:
        what = f"`{chosen.value}` divides by the scaling of the update, which is {scaling:g} on `{path}`"
        yield rules.START_UNFIT(what, fix="Give a positive scaling.", where=path)
    with boundary(f"the start `{chosen.start.name}`", "check_layer", path):
        yield from chosen.problems(config, layer, rank, path, option)


def settle_start(draft: Draft, context: Context) -> Draft:
    """What a reader should know of a start: that base weights change, and that data is read; tied weights are refused."""
    chosen = known_start(context.method, draft.config)
    if chosen is None or not draft.maps:
        return draft
    start, notes = chosen.start, []
    sites = [site for site in draft.maps if chosen.acts_on(site.layer)]
    if start.changes_base and sites:
        count = f"{len(sites):,} layer" + "s" * (len(sites) != 1)
        notes.append(f"The start {chosen.value} changes the base weights of {count} while the adapter acts.")
        told = list(_shared(draft, context, chosen))
        draft = draft.told(*told)
    if start.reads is not Reads.NOTHING and not context.options.loading:
        by = f" by `{start.helper}`" if start.helper else ""
        notes.append(f"The start {chosen.value} reads {start.reads}: data goes through the model before training{by}.")
    return draft.but(notes=(*draft.notes, *notes))


def _shared(draft: Draft, context: Context, chosen: Chosen) -> Iterator[Diagnostic]:
    """Layers whose weight other modules use as well, or a checkpoint may carry: it cannot be another one."""
    tied = {name.rpartition(".")[0] for group in context.graph.ties for name in group}
    ends = {context.graph.model.input_embeddings, context.graph.model.output_embeddings}
    found = [site.path for site in draft.maps if site.path in tied | ends and chosen.acts_on(site.layer)]
    if found:
        what = f"`{chosen.value}` changes the weight of {listed(found)}, which other modules, or files of vocabularies, have as well"
        fix = f"Exclude it (`exclude_modules`), or {chosen.otherwise(context.method.start_option)}."
        yield rules.START_UNFIT(what, fix=fix, where=found[0])
