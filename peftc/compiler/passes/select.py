"""The passes that decide which modules are meant: match, and what takes a match away again.

Each is a pure function `(draft, context) -> draft`. Entries that turn out to mean nothing are found at the end, by
`find_dead_targets`, when it is known what is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import chain

from peftc import rules
from peftc.compiler.match import ALL_LINEAR, Deadline, Layers, Names, Pattern, PatternKeys, is_all_linear
from peftc.compiler.passes.draft import Context, Draft, listed, option
from peftc.compiler.passes.former import adapts_experts, divided_by, finder, means_fused
from peftc.compiler.passes.former_targets import FormerTarget, former_paths
from peftc.config.mixins import LayersMixin, TargetNamesMixin
from peftc.config.types import TaskType
from peftc.diagnostics import Diagnostic, PeftcError, Severity, did_you_mean
from peftc.graph.nodes import LINEAR_KINDS, Kind, ModuleGraph, suffixes

#: Heads that a task trains along, those of them that the model has. The reference's lists.
TASK_HEADS: Mapping[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def add_task_heads(draft: Draft, context: Context) -> Draft:
    """Modules to save that the task brings: the head of a classifier starts at random and has to be trained."""
    task = draft.config.task_type
    brings = task is not None and task in TASK_HEADS and "modules_to_save" in type(draft.config).model_fields
    if not context.options.task_heads or task is None or not brings:
        return draft
    given: list[str] = option(draft.config, "modules_to_save") or []
    added = [name for name in TASK_HEADS[task] if name not in given]
    return draft.configured(modules_to_save=[*given, *added])


def match_targets(draft: Draft, context: Context) -> Draft:
    """Every module that `target_modules` means."""
    if not isinstance(draft.config, TargetNamesMixin):
        return draft
    targets = draft.config.target_modules
    if targets is None or (not targets and not isinstance(targets, str)):
        return draft
    if is_all_linear(targets):
        found = dict.fromkeys(_linear_layers(draft, context), (ALL_LINEAR,))
        return draft.but(source=ALL_LINEAR, targets=found)
    paths = (node.path for node in context.graph.nodes if node.path)
    if isinstance(targets, str):
        try:
            pattern = Pattern(targets, Deadline(), context.where("target_modules"))
            return draft.but(targets={path: (targets,) for path in paths if pattern.matches(path)})
        except PeftcError as error:
            return draft.failed(error)
    names = Names(targets)
    return draft.but(targets={path: entries for path in paths if (entries := names.find(path))})


def match_parameters(draft: Draft, context: Context) -> Draft:
    """Every parameter that `target_parameters` means: by its full name, or a suffix of it at a dot."""
    targets = option(draft.config, "target_parameters")
    if not targets:
        return draft
    names, where = Names(set(targets)), context.where("target_parameters")
    found: dict[tuple[str, str], str] = {}
    for node in context.graph.nodes:
        for name in node.facts.params if node.path else ():
            entries = names.find(f"{node.path}.{name}")
            if entries:
                found[node.path, name] = entries[0]
    known = {f"{n.path}.{name}" for n in context.graph.nodes for name, t in n.facts.params.items() if len(t.shape) > 1}
    dead = [
        entry
        for entry in dict.fromkeys(targets)
        if entry not in found.values() and entry not in context.options.allow_dead
    ]
    problems = [
        rules.DEAD_TARGET(
            f"No parameter is called `{entry}`",
            fix=did_you_mean(entry, _endings(known)) or "Remove it.",
            where=context.where("target_parameters", entry),
            severity=context.dead if found or option(draft.config, "target_modules") else Severity.ERROR,
        )
        for entry in dead
    ]
    twice = sorted({path for path, _ in found} & draft.targets.keys())
    if twice:
        what = f"{listed(twice)}: the module is meant by `target_modules`, a parameter of it by `target_parameters`"
        problems.append(rules.BAD_TARGET(what, fix="Remove it from one of them.", where=where))
    return draft.but(parameters=found).told(*problems)


def _linear_layers(draft: Draft, context: Context) -> Iterable[str]:
    """All linear layers but the output embedding, or the classifier of a sequence classification model."""
    graph = context.graph
    head = graph.model.output_embeddings
    if head is None and draft.config.task_type is TaskType.SEQ_CLS and graph.model.model_type:
        head = next((name for name in ("score", "classifier") if name in graph.by_path), None)
    return (n.path for n in graph.nodes if n.facts.kind in LINEAR_KINDS and n.path and n.path != head)


def spare_saved(draft: Draft, context: Context) -> Draft:
    """Modules that are trained whole, and everything in them, are never adapted as well."""
    saved = option(draft.config, "modules_to_save")
    if not saved or not draft.targets:
        return draft
    marks = [(f".{name}.", f"`{name}` is trained whole (modules_to_save)") for name in saved]
    dropped = {}
    for path in draft.targets:
        dotted = f".{path}."
        reason = next((reason for mark, reason in marks if mark in dotted), None)
        if reason is not None:
            dropped[path] = reason
    return draft.without(dropped)


def exclude(draft: Draft, context: Context) -> Draft:
    """Targets that `exclude_modules` leaves alone."""
    excluded = option(draft.config, "exclude_modules")
    if not excluded:
        return draft
    try:
        return _exclude(draft, context, excluded)
    except PeftcError as error:
        return draft.failed(error)


def _exclude(draft: Draft, context: Context, excluded: set[str] | str) -> Draft:
    where = context.where("exclude_modules")
    dead = {excluded} if isinstance(excluded, str) else set(excluded)
    find, every_expert = finder(excluded, where)
    found = {path: entries for path in draft.targets if (entries := find(path))}
    found |= {
        path: meaning.entries
        for path, target in draft.former.items()
        if path in draft.targets and (meaning := target.excluded(find, every_expert)).is_whole
    }
    dead -= {entry for entries in found.values() for entry in entries}
    by = "the pattern" if isinstance(excluded, str) else ""
    dropped = {path: f"excluded by {by or f'`{entries[0]}`'} in exclude_modules" for path, entries in found.items()}
    divided = list(divided_by(draft, find, every_expert, where))
    dead = set() if divided and isinstance(excluded, str) else dead - {e for _, entries in divided for e in entries}
    problems = [problem for problem, _ in divided]
    if draft.targets:
        problems += [_dead_exclude(entry, draft, context) for entry in sorted(dead - context.options.allow_dead)]
    return draft.without(dropped).told(*problems)


def _dead_exclude(entry: str, draft: Draft, context: Context) -> Diagnostic:
    where = context.where("exclude_modules", entry)
    if isinstance(option(draft.config, "exclude_modules"), str):
        where = context.where("exclude_modules")
        fix = "It is a regular expression over the full path, e.g. `.*\\.vision_tower\\..*`."
        return rules.DEAD_EXCLUDE(
            f"The pattern `{entry}` excludes no target", fix=fix, where=where, severity=context.dead
        )
    below = [path for path in draft.targets if f".{entry}." in f".{path}"]
    if below:
        fix = f"Exclude the layers in it by a pattern: `(.*\\.)?{entry}\\..*`."
        what = f"`{entry}` excludes the module of that name but not the {len(below):,} targets in it, as {listed(below, 1)}"
        return rules.DEAD_EXCLUDE(what, fix=fix, where=where, severity=context.dead)
    names = Names([entry])
    if any(names.find(node.path) for node in context.graph.nodes):
        what = f"`{entry}` is no target, so excluding it changes nothing"
        return rules.DEAD_EXCLUDE(what, fix="Remove it.", why="", where=where, severity=Severity.WARNING)
    hint = did_you_mean(entry, _endings(draft.targets)) or "Remove it."
    what = f"You have passed exclude_modules=`{entry}` but no modules were excluded by it: none is called so"
    return rules.DEAD_EXCLUDE(what, fix=hint, where=where, severity=context.dead)


def filter_layers(draft: Draft, context: Context) -> Draft:
    """Targets outside of `layers_to_transform`. A full path is meant exactly and stays."""
    config = draft.config
    if not isinstance(config, LayersMixin) or config.layers_to_transform in (None, []):
        return draft
    wanted = wanted_layers(config)
    try:
        index = layer_indices(draft.targets, config, context)
    except PeftcError as error:
        return draft.failed(error)
    outside = {path: i for path, i in index.items() if i not in wanted}
    exact = [path for path in outside if draft.targets[path][0] == path]
    dropped = {
        path: "it is in no numbered layer" if i is None else f"layer {i} is not in layers_to_transform"
        for path, i in outside.items()
        if draft.targets[path][0] != path
    }
    known = {i for i in index.values() if i is not None}
    problems = [_dead_layer(i, known, context) for i in sorted(wanted - known)] if draft.targets else []
    numbered = [path for path in exact if index[path] is not None]
    if numbered:
        what = f"{listed(numbered)}: a full path, which `layers_to_transform` does not filter"
        fix = "Remove it, or give a suffix."
        problems.append(rules.LAYERS_BYPASSED(what, fix=fix, where=context.where("layers_to_transform")))
    return draft.without(dropped).told(*problems)


def wanted_layers(config: LayersMixin) -> set[int]:
    """The indices in `layers_to_transform`."""
    given = config.layers_to_transform
    return {given} if isinstance(given, int) else set(given or ())


def layer_indices(paths: Iterable[str], config: LayersMixin, context: Context) -> dict[str, int | None]:
    """The layer that each path is in, None outside of layers. Raises `PeftcError` on a bad `layers_pattern`."""
    patterns = config.layers_pattern or []
    where = context.where("layers_pattern")
    layers = Layers([patterns] if isinstance(patterns, str) else patterns, Deadline(), where)
    return {path: layers.index(path) for path in paths}


def take_given(draft: Draft, context: Context) -> Draft:
    """The paths that are given instead of what the config means; the graph's order, and a warning where the two differ."""
    if not isinstance(draft.config, TargetNamesMixin):
        return draft
    given = context.options.given or frozenset()
    found = {node.path: (node.path,) for node in context.graph.nodes if node.path in given}
    unknown = sorted(given - found.keys())
    if unknown:
        hint = did_you_mean(unknown[0], (node.path for node in context.graph.nodes))
        fix = hint or "Load it onto the base model that it was made for."
        severity = Severity.WARNING if found else Severity.ERROR
        what = f"{listed(unknown)}: the model has no module there"
        draft = draft.told(rules.NO_MATCH(what, fix=fix, where=unknown[0], severity=severity))
    only_config, only_given = (sorted(a.keys() - b.keys()) for a, b in ((draft.targets, found), (found, draft.targets)))
    if found and (only_config or only_given):
        sides = [f"only the config has {listed(only_config)}"] * bool(only_config)
        sides += [f"only the given paths have {listed(only_given)}"] * bool(only_given)
        what = f"The config means other modules than those that are adapted: {' and '.join(sides)}"
        fix = "If it was not intended, correct `target_modules`."
        draft = draft.told(rules.GIVEN_TARGETS(what, fix=fix, where=context.where("target_modules")))
    return draft.but(source="given", targets=found)


def _dead_layer(index: int, known: set[int], context: Context) -> Diagnostic:
    span = f"targets are in layers {min(known)} to {max(known)}" if known else "no target is in a numbered layer"
    return rules.DEAD_LAYER(
        f"Layer {index} has no target: {span}",
        fix="Correct the index, or set `layers_pattern` to the name of the list of layers.",
        where=context.where("layers_to_transform"),
        severity=context.dead,
    )


def apply_patterns(draft: Draft, context: Context) -> Draft:
    """Pattern options (`rank_pattern`, …): for each target the key in force, if any."""
    chosen: dict[str, list[tuple[str, str]]] = {}
    paths = [*draft.targets, *(f"{path}.{name}" for path, name in draft.parameters)]
    problems: list[Diagnostic] = []
    for name in draft.config.pattern_options:
        values: Mapping[str, object] = option(draft.config, name) or {}
        if not values:
            continue
        try:
            keys = PatternKeys(tuple(values), Deadline(), context.where(name))
            found = {path: key for path in paths if (key := keys.find(path)) is not None}
        except PeftcError as error:
            problems.extend(error.diagnostics)
            continue
        used = set(found.values())
        for path, key in found.items():
            chosen.setdefault(path, []).append((name, key))
        if paths:
            dead = [key for key in values if key not in used and key not in context.options.allow_dead]
            problems.extend(_dead_key(key, name, draft, context) for key in dead)
    return draft.but(overrides={path: tuple(pairs) for path, pairs in chosen.items()}).told(*problems)


def _dead_key(key: str, name: str, draft: Draft, context: Context) -> Diagnostic:
    alone = PatternKeys((key,), Deadline(), context.where(name))
    if any(alone.find(path) for path in draft.targets):
        what, fix = (
            f"An earlier key of `{name}` matches every module that `{key}` matches",
            "Put the narrower key first.",
        )
    else:
        what = f"`{key}` in `{name}` matches no target"
        fix = did_you_mean(key, _endings(draft.targets)) or "Remove it; keys match the end of a target's path."
    return rules.DEAD_PATTERN(what, fix=fix, where=context.where(name, key), severity=context.dead)


def find_dead_targets(draft: Draft, context: Context) -> Draft:
    """Entries of `target_modules` that mean nothing, and adapters without any target."""
    config = draft.config
    if not isinstance(config, TargetNamesMixin) or config.target_modules is None:
        return draft
    if any(problem.code in _PATTERN_CODES for problem in draft.problems):
        return draft  # what a broken pattern would have matched is not known
    if not draft.targets and not (draft.parameters and not draft.dropped.keys() - draft.former.keys()):
        draft = draft.told(_no_match(draft, context, config.target_modules))
        if not draft.dropped:
            return draft  # which names every entry
    if not isinstance(config.target_modules, set) or draft.source == ALL_LINEAR:
        return draft
    alive = {entry for entries in draft.targets.values() for entry in entries}
    alive |= {entry for target in draft.former.values() for entry in target.meaning.entries}
    dead = config.target_modules - alive - context.options.allow_dead
    if not draft.targets:
        names = Names(dead)
        dead -= {entry for path in draft.dropped for entry in names.find(path)}
    return draft.told(*(_dead_target(entry, draft, context) for entry in sorted(dead)))


_PATTERN_CODES = {rules.BAD_PATTERN.code, rules.LONG_PATTERN.code, rules.SLOW_PATTERN.code}


def follow_ties(draft: Draft, context: Context) -> Draft:
    """Layers that share their weight with a target, for methods that act on all uses of a weight. The config stays."""
    if not context.method.follows_ties:
        return draft
    tied: dict[str, tuple[str, ...]] = {}
    for group in context.graph.ties:
        owners = [name.removesuffix(".weight") for name in group if name.endswith(".weight")]
        target = next((path for path in owners if path in draft.targets), None)
        if target is not None:
            tied |= dict.fromkeys(owners, (f"tied to {target}",))
    targets = {**tied, **draft.targets}
    return draft.but(targets={node.path: targets[node.path] for node in context.graph.nodes if node.path in targets})


def _dead_target(entry: str, draft: Draft, context: Context) -> Diagnostic:
    where = context.where("target_modules", entry)
    names = Names([entry])
    lost = {path: reason for path, reason in draft.dropped.items() if names.find(path)}
    if lost:  # another option says so: worth knowing, but nobody's slip
        reason = Counter(lost.values()).most_common(1)[0][0]
        what, fix = f"`{entry}` means {listed(lost)}, left alone: {reason}", f"Remove `{entry}`, or what takes it away."
        return rules.DEAD_TARGET(what, fix=fix, where=where, severity=Severity.WARNING)
    fused = means_fused(entry, context.graph)
    if fused is not None:
        asked = draft.source == "target_modules"
        return _not_for_experts(entry, fused, context, Severity.ERROR if asked else Severity.WARNING)
    hint = did_you_mean(entry, _endings(_supported(context))) or f"The model has {adaptable(context.graph)}."
    severity = context.dead if draft.source == "target_modules" else Severity.WARNING
    return rules.DEAD_TARGET(f"No module is called `{entry}`", fix=hint, where=where, severity=severity)


def _not_for_experts(
    entry: str, fused: FormerTarget, context: Context, severity: Severity = Severity.ERROR
) -> Diagnostic:
    """An entry that means layers which are a parameter now, for a method that adapts no parameters: only a remark, where the
    entry is a default that other layers have as well."""
    what = (
        f"`{entry}` is a part of the parameter `{fused.path}` now, and {context.method.peft_type} adapts no parameters"
    )
    fix = "Leave it out, or use a method that adapts experts: `peftc methods` says which do."
    return rules.BAD_TARGET(what, why="", fix=fix, where=context.where("target_modules", entry), severity=severity)


def _no_match(draft: Draft, context: Context, targets: set[str] | str) -> Diagnostic:
    where = context.where("target_modules")
    if draft.dropped:
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in Counter(draft.dropped.values()).most_common(3))
        fix = "Loosen what takes them away, or choose other targets."
        return rules.NO_MATCH(f"All {len(draft.dropped):,} targets are left alone: {reasons}", fix=fix, where=where)
    has = f"The model has {adaptable(context.graph)}."
    if not isinstance(targets, str):
        fused = [(entry, found) for entry in sorted(targets) if (found := means_fused(entry, context.graph))]
        if fused:
            return _not_for_experts(*fused[0], context)
        hints = [did_you_mean(entry, _endings(_supported(context))) for entry in sorted(targets)[:5]]
        fix = " ".join([*dict.fromkeys(hint for hint in hints if hint), has])
        told = f"Target modules {listed(sorted(targets))} not found in the base model: none is called so"
        return rules.NO_MATCH(told if targets else "The empty list means no module", fix=fix, where=where)
    if is_all_linear(targets):
        return rules.NO_MATCH("The model has no linear layer", fix="Name the modules in `target_modules`.", where=where)
    name = Names([targets])
    if any(name.find(node.path) for node in context.graph.nodes):
        fix = f"A string is a regular expression over the full path; write a list: `[{targets}]`."
    else:
        fix = f"It has to match the full path, as {listed(list(_supported(context))[:1])}. {has}"
    what = f"Target modules `{targets}` not found in the base model: the pattern matches no module"
    return rules.NO_MATCH(what, fix=fix, where=where)


def _supported(context: Context) -> Iterable[str]:
    """Paths of layers that have a kind."""
    own = (node.path for node in context.graph.nodes if node.facts.kind is not Kind.OTHER and node.path)
    return chain(own, former_paths(context.graph)) if adapts_experts(context) else own


def _endings(paths: Iterable[str]) -> Collection[str]:
    """Suffixes without a number that paths end in, for suggestions: `q_proj`, `self_attn.q_proj`."""
    found = (s for path in paths for s in suffixes(path) if not any(part.isdigit() for part in s.split(".")))
    return list(dict.fromkeys(found))


def adaptable(graph: ModuleGraph) -> str:
    """The most frequent names of linear and convolutional layers, for a sentence."""
    kinds = {Kind.OTHER, Kind.NORM, Kind.EMBEDDING}
    counts = Counter(n.name for n in graph.nodes if n.facts.kind not in kinds and not n.name.isdigit() and n.path)
    return listed((name for name, _ in counts.most_common()), 10) or "no linear or convolutional layer"
