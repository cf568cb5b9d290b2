"""Targets under the names that layers had before a library fused them: which parameters of today they mean.

A library may keep as one tensor what was a linear layer for each expert, and as a module of its own what was a linear layer
that routes. `match_former` finds what targets mean under either name, as paths of parameters among the other targets;
exclusions and layer filters act on them as on modules; then `settle_former` writes them into `target_parameters`, with ranks
and scales that leave the mathematics as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from peftc import rules
from peftc.compiler.match import ALL_LINEAR, Deadline, Names, Pattern, PatternKeys, is_all_linear, shortened
from peftc.compiler.passes.draft import Context, Draft, listed, option
from peftc.compiler.passes.former_targets import Find, FormerTarget, Meaning, former_targets
from peftc.compiler.plan.rewrite import Rewrite
from peftc.config.mixins import TargetNamesMixin
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import EXPERT_KINDS, ModuleGraph
from peftc.registry.boundary import boundary
from peftc.tuner.experts import tuner_for


def adapts_experts(context: Context) -> bool:
    """Whether the adapter's method can adapt single parameters, and its config can name them."""
    method = context.method
    return "target_parameters" in method.config.model_fields and not EXPERT_KINDS.isdisjoint(method.supports)


def match_former(draft: Draft, context: Context) -> Draft:
    """Every parameter that `target_modules` means under the name of a layer that it was; experts and routers for `all-linear`."""
    config = draft.config
    targets = config.target_modules if isinstance(config, TargetNamesMixin) else None
    if not targets or draft.source == "default" or not adapts_experts(context):
        return draft
    try:
        found = {target.path: target for target in _meant(targets, draft, context)}
    except PeftcError as error:
        return draft.failed(error)
    if not found:
        return draft
    routers = {target.module for target in found.values()}  # by their weights from here on
    kept = {path: entries for path, entries in draft.targets.items() if path not in routers}
    former = {path: target.meaning.entries for path, target in found.items()}
    return draft.but(targets={**kept, **former}, former=found)


def _meant(targets: set[str] | str, draft: Draft, context: Context) -> Iterator[FormerTarget]:
    if is_all_linear(targets):
        chosen = bool(option(draft.config, "target_parameters"))
        for target in former_targets(context.graph):
            if target.layers or not chosen:  # who names such parameters says which of them
                yield replace(target, meaning=Meaning((ALL_LINEAR,)))
        return
    find, every_expert = finder(targets, context.where("target_modules"))
    for target in former_targets(context.graph):
        meaning = target.meant(find, every_expert)
        if meaning.entries:
            yield replace(target, meaning=meaning)


def finder(targets: set[str] | str, where: str) -> tuple[Find, bool]:
    """How entries are found by path, and whether they can tell experts apart. Raises `PeftcError` on a bad pattern."""
    if isinstance(targets, str):
        text, pattern = targets, Pattern(targets, Deadline(), where)
        return lambda path: (text,) if pattern.matches(path) else (), True
    return Names(targets).find, any(part.isdigit() for entry in targets for part in entry.split("."))


def means_fused(entry: str, graph: ModuleGraph) -> FormerTarget | None:
    """A parameter that the entry means by the name of a layer that it was."""
    find, every_expert = finder({entry}, "$")
    return next((t for t in former_targets(graph) if t.meant(find, every_expert).entries), None)


def settle_former(draft: Draft, context: Context) -> Draft:
    """Write what is left of those targets into `target_parameters`, and their ranks and scales into the pattern options."""
    if not draft.former:
        return draft
    left = [target for path, target in draft.former.items() if path in draft.targets]
    targets = {path: entries for path, entries in draft.targets.items() if path not in draft.former}
    draft = draft.but(targets=targets)
    if not context.options.loading:  # a file may hold a part of what is one now: the rest stays as in the base
        draft = draft.told(*_divided(left, context))
    if not left:
        return draft
    given = list(option(draft.config, "target_parameters") or ())
    known = Names(set(given))
    paths = [t.path for t in left if not known.find(t.path)]
    everything = (f"{node.path}.{name}" for node in context.graph.nodes for name in node.facts.params if node.path)
    names = sorted(shortened(paths, [path for path in everything if not known.find(path)])) if paths else []
    draft = _without_former_names(draft).configured(target_parameters=[*given, *names])
    draft = _coupled(draft, left, context)
    found = Names({*given, *names})
    try:
        patterns, scaled = _Joined(draft, context).patterns(left)
    except PeftcError as error:
        return draft.failed(error)
    rewrites = dict.fromkeys(
        Rewrite(t.meaning.entries, t.names, next(iter(found.find(t.path)), t.path), scaled.get(t.path, ()))
        for t in left
    )
    return draft.configured(**patterns).but(rewrites=tuple(rewrites))


def _without_former_names(draft: Draft) -> Draft:
    """The config without entries of `target_modules` that mean no module."""
    names = option(draft.config, "target_modules")
    if not isinstance(names, set):
        return draft
    find = Names(names).find
    of_modules = {entry for entries in draft.targets.values() for entry in entries}
    of_modules |= {entry for path in draft.dropped if path not in draft.former for entry in find(path)}
    gone = {entry for target in draft.former.values() for entry in target.meaning.entries} - of_modules
    return draft.configured(target_modules=names - gone) if gone else draft


def _coupled(draft: Draft, left: Iterable[FormerTarget], context: Context) -> Draft:
    """Options beside the targets that name some of them: the parameters, where they name what those were."""
    for name in context.method.default_targets:
        given = option(draft.config, name)
        if name == "target_modules" or not given or not isinstance(given, set):
            continue
        find, every_expert = finder(given, context.where(name))
        meant = {target: target.meant(find, every_expert) for target in left}
        whole = {target for target, meaning in meant.items() if meaning.entries and not meaning.missing}
        parameters = Names(set(option(draft.config, "target_parameters")))
        new = {parameters.find(target.path)[0] for target in whole}
        gone = {entry for target in whole for entry in meant[target].entries}
        kept = {entry for path in draft.targets for entry in Names(given).find(path)}
        draft = draft.configured(**{name: (given - gone) | (gone & kept) | new})
    return draft


def _divided(targets: Iterable[FormerTarget], context: Context) -> Iterator[Diagnostic]:
    """Parameters of which a part is meant. Repeated layers are told once."""
    divided = [target for target in targets if target.meaning.missing or target.meaning.uneven]
    where = context.where("target_modules")
    for kind in dict.fromkeys(target.meaning for target in divided):
        own = [target for target in divided if target.meaning == kind]
        yield divided_parameter(own[0], kind, len(own), where)


def divided_by(
    draft: Draft, find: Find, every_expert: bool, where: str
) -> Iterator[tuple[Diagnostic, tuple[str, ...]]]:
    """Parameters that are targets and of which a part is excluded, with the entries that do so."""
    told: dict[Meaning, list[FormerTarget]] = {}
    for path, target in draft.former.items():
        meaning = target.excluded(find, every_expert) if path in draft.targets else Meaning(())
        if meaning.entries and not meaning.is_whole:
            told.setdefault(meaning, []).append(target)
    for meaning, targets in told.items():
        yield divided_parameter(targets[0], meaning, len(targets), where), meaning.entries


def divided_parameter(target: FormerTarget, meaning: Meaning, count: int, where: str) -> Diagnostic:
    """The diagnostic for options that mean a part of what is one parameter now."""
    more = f", as of {count - 1:,} more" if count > 1 else ""
    if meaning.missing:
        named = tuple(name for name in target.names if name not in meaning.missing)
        what = f"{listed(named)} is a part of `{target.path}`{more}, together with {listed(meaning.missing)}"
        fix = f"Name {listed(meaning.missing)} as well, or leave {listed(named)} out."
    else:
        what = f"{listed(meaning.entries)} means some of the experts in `{target.path}`{more}"
        fix = "Leave the number out: all experts of a layer are one tensor."
    return rules.PART_OF_FUSED(what, fix=fix, where=where)


class _Joined:
    """Ranks and scales of parameters that were several layers: the sum of the layers' ranks, at the layers' scale."""

    def __init__(self, draft: Draft, context: Context) -> None:
        self._config, self._context, self._modules = draft.config, context, draft.targets
        self._keys = {
            name: PatternKeys(tuple(values), Deadline(), context.where(name))
            for name in self._config.pattern_options
            if (values := option(self._config, name))
        }
        self._spent: set[tuple[str, str]] = set()

    def patterns(
        self, targets: Iterable[FormerTarget]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[tuple[str, Any, Any], ...]]]:
        """The pattern options with the values that these parameters need, and by path what was changed:
        `(option, before, now)`. Raises `PeftcError` where layers that are one now have different scales."""
        wanted: dict[str, dict[str, Any]] = {name: {} for name in self._config.pattern_options}
        changed: dict[str, tuple[tuple[str, Any, Any], ...]] = {}
        paths = list(targets)
        for target in paths:
            before = [self._of_layer(target, part) for part in range(len(target.layers))]
            now = self._together(target, before) if before else {}
            changes = []
            for pattern, name in self._config.pattern_options.items():
                if name not in now or self._key(pattern, target.path) is not None:
                    continue
                if now[name] != getattr(self._config, name):
                    wanted[pattern][target.path] = now[name]
                    changes.append((name, before[0].get(name, getattr(self._config, name)), now[name]))
            changed[target.path] = tuple(changes)
        return {p: self._written(p, values, paths) for p, values in wanted.items()}, changed

    def _key(self, pattern: str, *paths: str) -> str | None:
        keys = self._keys.get(pattern)
        return next((key for path in paths if keys and (key := keys.find(path)) is not None), None)

    def _of_layer(self, target: FormerTarget, part: int) -> dict[str, Any]:
        """Options that patterns set for a layer that was."""
        found = {}
        for pattern, name in self._config.pattern_options.items():
            key = self._key(pattern, *target.example(part))
            if key is not None and self._key(pattern, target.path) is None:
                found[name] = option(self._config, pattern)[key]
                self._spent.add((pattern, key))
        return found

    def _together(self, target: FormerTarget, layers: list[dict[str, Any]]) -> dict[str, Any]:
        """Options with which the parameter can be what the layers were, each with an update of its own."""
        config, options = self._config, self._config.pattern_options.values()
        scales = {self._scaling(target, layer) for layer in layers}
        if len(scales) > 1 and not self._context.options.loading:  # what is loaded is brought to the first one's scale
            told = ", ".join(f"{scale:g} for `{n}`" for n, scale in zip(target.names, sorted(scales), strict=False))
            what = f"The scales of layers that are one in `{target.path}` differ: {told}"
            fix = f"Give {listed(target.names)} the same scale."
            raise PeftcError(rules.PART_OF_FUSED(what, fix=fix, where=target.module))
        now = dict(layers[0])
        if "r" in options:
            now["r"] = sum(layer.get("r", option(config, "r")) for layer in layers)
        numerator = config.pattern_options.get("alpha_pattern")
        if numerator is not None:
            own = layers[0].get(numerator, getattr(config, numerator))
            scale = self._scaling(target, {**now, numerator: own})
            value = own * self._scaling(target, layers[0]) / scale if scale else own
            now[numerator] = round(value) if abs(value - round(value)) < 1e-9 else value
        return now

    def _scaling(self, target: FormerTarget, options: Mapping[str, Any]) -> float:
        node = self._context.graph.by_path[target.module]
        facts = node.facts.of_parameter(target.parameter)
        assert facts is not None  # it has two or three dimensions
        config = self._config.model_copy(update=dict(options))
        with boundary(self._context.method.peft_type, "scaling", target.path):
            tuner = tuner_for(self._context.method, config, node.of_parameter(target.parameter, facts))
            return tuner.scaling(config, facts)

    def _written(self, pattern: str, values: Mapping[str, Any], targets: Iterable[FormerTarget]) -> dict[str, Any]:
        """The option with keys for these paths: one for parameters of one name where they agree, as the reference writes it."""
        given = {k: v for k, v in (option(self._config, pattern) or {}).items() if not self._is_spent(pattern, k)}
        alike: dict[str, set[Any]] = {}
        for target in targets:
            if self._key(pattern, target.path) is None:
                alike.setdefault(_ending(target), set()).add(values.get(target.path))
        keys: dict[str, Any] = {}
        for target in targets:
            if target.path in values:
                ending = _ending(target)
                whole = len(alike[ending]) == 1 and not any(path.endswith(f".{ending}") for path in self._modules)
                keys[rf".*\.{re.escape(ending)}" if whole else target.path] = values[target.path]
        return {**given, **keys}

    def _is_spent(self, pattern: str, key: str) -> bool:
        """Whether a key was for layers that were, and for no module that there is."""
        if (pattern, key) not in self._spent:
            return False
        alone = PatternKeys((key,), Deadline(), self._context.where(pattern))
        return not any(alone.find(path) for path in self._modules)


def _ending(target: FormerTarget) -> str:
    """How a parameter is told from others: a weight by its module as well."""
    return f"{target.module.rpartition('.')[2]}.{target.parameter}" if target.experts == 0 else target.parameter
