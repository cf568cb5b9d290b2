"""The compiler's passes, in order: a tuple of pure functions `(draft, context) -> draft`.

What a method brings by mixins has its pass here; a pass leaves a draft alone whose config has no such option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftc.compiler.match import Names, is_all_linear, matches, shortened
from peftc.compiler.passes import checks, defaults, former, modules, prompts, rows, select, sites, starts, ties
from peftc.compiler.passes.draft import Context, Draft, option
from peftc.config.mixins import LayersMixin

Pass = Callable[[Draft, Context], Draft]

#: From this many targets on, a saved list is shortened to suffixes. The reference's number.
_LONG_LIST = 20


def record_targets(draft: Draft, context: Context) -> Draft:
    """Write the targets into the config that is saved: shorthands spelled out, long lists as the fewest suffixes."""
    targets = option(draft.config, "target_modules")
    if not draft.targets or targets is None:
        return draft
    names: set[str] | str = targets
    changes: dict[str, Any] = {}
    if is_all_linear(targets):
        filtered = isinstance(draft.config, LayersMixin) and draft.config.layers_to_transform is not None
        dropped = draft.dropped.keys() - draft.former.keys()
        names = set(draft.targets) | (set() if filtered else dropped)
        changes |= _spelled_out(draft, context, names)
    coupled = len(context.method.default_targets) > 1  # options that name some of the targets need the same spelling
    if isinstance(names, set) and len(names) >= _LONG_LIST and not coupled:
        found = Names(names)
        others = (node.path for node in context.graph.nodes if node.path and not found.find(node.path))
        fewer = shortened(names, others)
        names = set(fewer) if len(fewer) < len(names) else names
    return draft.configured(target_modules=names, **changes)


def _spelled_out(draft: Draft, context: Context, names: set[str]) -> Mapping[str, set[str]]:
    """Options beside the targets that name some of them, as full paths as well."""
    beside = {name: option(draft.config, name) for name in context.method.default_targets if name != "target_modules"}
    return {name: {path for path in names if matches(given, path)} for name, given in beside.items() if given}


PASSES: tuple[Pass, ...] = (
    defaults.resolve_defaults,
    select.add_task_heads,
    ties.name_saves,
    select.match_targets,
    former.match_former,
    select.spare_saved,
    ties.spare_tied,
    select.exclude,
    select.filter_layers,
    former.settle_former,
    select.match_parameters,
    select.apply_patterns,
    select.find_dead_targets,
    ties.tie_targets,
    record_targets,
    select.follow_ties,
    sites.resolve_orientation,
    sites.declare_slots,
    starts.settle_start,
    ties.tie_maps,
    modules.wrap_modules,
    sites.copy_modules,
    ties.tie_copies,
    rows.train_rows,
    sites.train_biases,
    prompts.add_prompt,
    ties.check_kept,
    checks.check_ties,
    checks.check_router,
    checks.check_experts,
    checks.check_coverage,
    checks.check_towers,
    checks.check_direct_reads,
    checks.check_gradients,
)


#: What settles the targets when their paths are given: the config's own choice is only compared with them.
_SETTLED_BY_CONFIG = {select.find_dead_targets}
PASSES_IF_GIVEN: tuple[Pass, ...] = tuple(
    part
    for step in PASSES
    if step not in _SETTLED_BY_CONFIG
    for part in ((select.take_given, step) if step is select.apply_patterns else (step,))
)


def run_passes(draft: Draft, context: Context) -> Draft:
    """All passes over one adapter; problems are gathered in the draft."""
    for step in PASSES if context.options.given is None else PASSES_IF_GIVEN:
        draft = step(draft, context)
    return draft
