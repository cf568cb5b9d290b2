"""What each pass did to one module, also to one that is not adapted: the difference of the drafts before and after it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from peftc import rules
from peftc.compiler.compile import begin, laid_out
from peftc.compiler.match import Names, is_all_linear
from peftc.compiler.passes.draft import Draft, Options, listed
from peftc.compiler.passes.former_targets import former_paths
from peftc.compiler.passes.order import PASSES
from peftc.compiler.plan.render import shape_of
from peftc.compiler.plan.sites import MapSite, ModuleSite
from peftc.config.base import PeftConfig
from peftc.config.mixins import TargetNamesMixin
from peftc.diagnostics import PeftcError, nearest
from peftc.graph.former import FormerPlace
from peftc.graph.nodes import ModuleGraph, ModuleNode
from peftc.registry.manager import Registry, default_registry


@dataclass(frozen=True, slots=True)
class Step:
    """A pass and its effects on the module; none if it left the module alone."""

    name: str
    effects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one adapter came to treat one module as it does. `verdict` is the outcome in a sentence."""

    path: str
    module: str
    adapter: str
    steps: tuple[Step, ...]
    verdict: str


def explain(
    graph: ModuleGraph, name: str, config: PeftConfig, path: str, registry: Registry | None = None
) -> Explanation:
    """Follow the module at `path` through the passes of one adapter. Raises `PeftcError` if there is no such module."""
    graph, _ = laid_out(graph, {name: config})
    node, now = graph.by_path.get(path), graph.former_names.find(path)
    if node is None and now is not None:
        node = graph.by_path.get(now.module)
    if node is None:
        named = [n.path for n in graph.nodes if n.name == path.rpartition(".")[2]]
        close = nearest(path, named or [*graph.by_path, *former_paths(graph)]) or nearest(path, graph.by_path)
        fix = f"Did you mean {listed(close)}?" if close else "`peftc graph` writes all paths to a file."
        raise PeftcError(rules.UNKNOWN_MODULE(f"The model has no module `{path}`", fix=fix, where=path))
    draft, context = begin(graph, name, config, registry or default_registry(), Options())
    steps = []
    for step in PASSES:
        after = step(draft, context)
        steps.append(Step(step.__name__, tuple(_effects(draft, after, node))))
        draft = after
    module = f"{_placed(now)}: {describe(node)}" if now is not None and node.path != path else describe(node)
    return Explanation(path, module, name, tuple(steps), _verdict(draft, node, graph))


def _placed(now: FormerPlace) -> str:
    """Where a former layer is now, in a few words."""
    part = f"part {now.part + 1} of {now.parts} of " if now.parts > 1 else ""
    expert = "" if now.expert is None else f", expert {now.expert}"
    return f"now {part}`{now.module}.{now.parameter}`{expert}"


def describe(node: ModuleNode) -> str:
    """A module in a few words: `Linear 576→1536, gate`."""
    facts = node.facts
    words = [facts.cls] + ([shape_of(facts)] if facts.in_features else [])
    notes = [node.role.value] if node.role else []
    notes += [facts.note] if facts.note else []
    return ", ".join([" ".join(words), *notes])


def _effects(before: Draft, after: Draft, node: ModuleNode) -> Iterator[str]:
    path = node.path
    yield from after.notes[len(before.notes) :]
    for own in (path, *(f"{path}.{name}" for name in node.facts.params)):
        of = f"`{own.rpartition('.')[2]}` is " if own != path else ""
        if own in after.targets and own not in before.targets:
            yield f"{of}meant by {listed(after.targets[own])} ({after.source})"
        if own in after.dropped and own not in before.dropped:
            yield f"{of}left alone: {after.dropped[own]}"
        if after.overrides.get(own) and not before.overrides.get(own):
            yield from (f"`{key}` in {name} is in force" for name, key in after.overrides[own])
    if len(after.rewrites) > len(before.rewrites):
        yield from (f"rewritten: {text}" for text in _rewritten(after, node))
    for site in () if _sites(before, path) else _sites(after, path):
        yield f"`{site.parameter}` gets {_slots(site)}" if site.parameter else f"gets {_slots(site)}"
        yield from (f"with {option} = {value}" for option, value in site.overrides)
    wrapped = _wrapped(after, path)
    if wrapped is not None and _wrapped(before, path) is None:
        yield f"meant by `{wrapped.reason}`: is wrapped, with {_slots(wrapped)}"
    if len(after.saves) > len(before.saves):
        yield from (
            f"copied and trained whole{', in float32' if s.lifted else ''}, in `{s.path}`"
            for s in after.saves
            if f"{path}.".startswith(f"{s.path}.")
        )
    if len(after.trains) > len(before.trains):
        yield from (f"its {train.name} is trained ({train.reason})" for train in after.trains if train.path == path)
    for problem in after.problems[len(before.problems) :]:
        if problem.where.path == path or f"`{path}`" in problem.what:
            yield f"{problem.severity.value}[{problem.code}]: {problem.what}"


def _rewritten(draft: Draft, node: ModuleNode) -> Iterator[str]:
    """What was made of targets that mean parameters of this module."""
    for rewrite in draft.rewrites:
        names = Names([rewrite.parameter])
        if any(names.find(f"{node.path}.{name}") for name in node.facts.params):
            yield str(rewrite)


def _sites(draft: Draft, path: str) -> list[MapSite]:
    return [site for site in (*draft.maps, *draft.rows) if site.path == path]


def _wrapped(draft: Draft, path: str) -> ModuleSite | None:
    return next((site for site in draft.modules if site.path == path), None)


def _slots(site: MapSite | ModuleSite) -> str:
    return ", ".join(f"{slot.name} {'×'.join(map(str, slot.shape))} {slot.dtype or site.dtype}" for slot in site.slots)


def _verdict(draft: Draft, node: ModuleNode, graph: ModuleGraph) -> str:
    path = node.path
    sites = _sites(draft, path)
    if sites:
        number = sum(slot.numel for site in sites for slot in site.slots if slot.trainable)
        return f"Adapted: {number:,} trainable parameters."
    wrapped = _wrapped(draft, path)
    if wrapped is not None:
        number = sum(slot.numel for slot in wrapped.slots if slot.trainable)
        return f"Wrapped: {number:,} trainable parameters; its own are `{path}.{wrapped.inner}.…` now."
    if any(f"{path}.".startswith(f"{save.path}.") for save in draft.saves):
        return "Not adapted: it is trained whole (modules_to_save)."
    if path in draft.targets:
        return "Not adapted: it was meant, but there is a problem."
    dropped = [own for own in (path, *(f"{path}.{name}" for name in node.facts.params)) if own in draft.dropped]
    if dropped:
        return f"Not adapted: {draft.dropped[dropped[0]]}."
    adapted = [*(s.path for s in draft.maps), *(s.path for s in draft.modules)]
    below = [site for site in adapted if site.startswith(f"{path}.") or not path]
    if below:
        return f"Not adapted itself; adapted in it: {listed(below)}."
    return f"Not adapted: {_why_not(draft, node, graph)}"


def _why_not(draft: Draft, node: ModuleNode, graph: ModuleGraph) -> str:
    config = draft.config
    if draft.modules:
        return f"{config.peft_type} wraps {listed([site.path for site in draft.modules])}."
    if not isinstance(config, TargetNamesMixin):
        return f"{config.peft_type} changes the model's input, not its layers."
    if draft.source == "all-linear" or is_all_linear(config.target_modules):
        if node.path == graph.model.output_embeddings:
            return "`all-linear` leaves out the output embedding; name it in `target_modules` to adapt it."
        return f"`all-linear` takes linear layers only, and this is {node.facts.kind.value}."
    targets = config.target_modules
    if isinstance(targets, str):
        return f"the pattern `{targets}` does not match its full path."
    close = nearest(node.name, targets or ())
    hint = f" The nearest is {listed(close, 1)}." if close else ""
    return f"no entry of `target_modules` is its path or a suffix of it.{hint} `{node.name}` would mean it."


def render_explanation(explanation: Explanation) -> str:
    """Plain text: the passes that did something, one a line, then the others, then the outcome."""
    width = max(len(step.name) for step in explanation.steps)
    lines = [f"{explanation.path or '(the model itself)'}  {explanation.module}", f"adapter {explanation.adapter}", ""]
    for step in explanation.steps:
        lines += [f"  {step.name if i == 0 else '':{width}}  {effect}" for i, effect in enumerate(step.effects)]
    idle = ", ".join(step.name for step in explanation.steps if not step.effects)
    lines.append(textwrap.fill(f"no effect: {idle}", 100, initial_indent="  ", subsequent_indent="    "))
    return "\n".join([*lines, "", explanation.verdict]) + "\n"
