"""The first pass: options that a config leaves out are taken from the model.

By the method itself, by a table for the model's type, or, where no table knows the type, by the roles that the table's
entries have. What was chosen by role is told in the plan's notes: it is a choice that no other library has made before.
"""

from __future__ import annotations

from collections.abc import Collection

from peftc import rules
from peftc.compiler.match import ALL_LINEAR, matches
from peftc.compiler.passes.by_role import among, find_by_role, written
from peftc.compiler.passes.draft import BY_ROLE, DEFAULT, Context, Draft, option, placed
from peftc.compiler.passes.select import adaptable, layer_indices, wanted_layers
from peftc.config.mixins import LayersMixin
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.targets import Targets, default_targets, table_roles
from peftc.registry.boundary import boundary

#: The option that says what is adapted; tables for others say how some of that is.
_TARGETS = "target_modules"


def resolve_defaults(draft: Draft, context: Context) -> Draft:
    """Options that the config leaves out: as the method takes them from the model, by a table, or by role."""
    try:
        with boundary(context.method.peft_type, "resolve"):
            found_out = dict(context.method.resolve(draft.config, context.graph))
    except PeftcError as error:
        return draft.told(*(placed(problem, context.name, draft.config) for problem in error.diagnostics))
    if found_out:
        draft = draft.configured(**found_out)
        draft = draft.but(source=DEFAULT) if _TARGETS in found_out else draft
    for name, table in context.method.default_targets.items():
        if option(draft.config, name) is None:
            draft = _by_table(draft, context, name, table)
    return draft


def _by_table(draft: Draft, context: Context, name: str, table: str) -> Draft:
    """One option as the table has it for this type of model; by role if it has not."""
    found = default_targets(table, context.graph.model.model_type)
    if found is None:
        only_parameters = option(draft.config, "target_parameters") and option(draft.config, _TARGETS) is None
        return draft if only_parameters else _by_role(draft, context, name, table)
    value: set[str] | str = found if isinstance(found, str) else set(found)
    chosen = option(draft.config, _TARGETS)
    if name != _TARGETS and isinstance(value, set) and isinstance(chosen, set):
        # entries that are not targets have no effect, and the reference refuses them in a file
        value = (value & chosen) | {path for path in context.options.given or () if matches(value, path)} & chosen
    draft = draft.configured(**{name: value})
    return draft.but(source=DEFAULT) if name == _TARGETS else draft


def _by_role(draft: Draft, context: Context, name: str, table: str) -> Draft:
    """One option by the roles that the table's entries have; a problem if no layer has them."""
    graph, roles = context.graph, table_roles(table)
    found = find_by_role(graph, roles)
    if found is None:
        return draft.told(_no_default(name, context))
    chosen = option(draft.config, _TARGETS)
    if name != _TARGETS and isinstance(chosen, Collection) and not isinstance(chosen, str):
        value = among(found.paths, chosen, graph)
    else:
        value = written(found.paths, graph)
    config = draft.config
    if isinstance(value, str) and isinstance(config, LayersMixin) and config.layers_to_transform not in (None, []):
        value = written(_filtered(found.paths, config, context), graph, numbered=True)
        if isinstance(value, str):
            return draft.told(_no_default(name, context))  # the reference refuses a pattern beside a filter
    draft = draft.configured(**{name: _option_value(value)})
    if name != _TARGETS:
        return draft
    what = f"{context.method.peft_type} has no default `{name}` for {_model(context)}; by role: {found.told}"
    return draft.but(source=BY_ROLE, notes=(*draft.notes, what))


def _filtered(paths: Collection[str], config: LayersMixin, context: Context) -> Collection[str]:
    """Those in `layers_to_transform`; all if the option for that is wrong, which the pass that filters tells."""
    try:
        indices = layer_indices(paths, config, context)
    except PeftcError:
        return paths
    return [path for path, index in indices.items() if index in wanted_layers(config)] or paths


def _option_value(targets: Targets) -> set[str] | str:
    return targets if isinstance(targets, str) else set(targets)


def _model(context: Context) -> str:
    model = context.graph.model
    return f"model type `{model.model_type}`" if model.model_type else f"class `{model.cls}`"


def _no_default(name: str, context: Context) -> Diagnostic:
    hint = f"This model has {adaptable(context.graph)}." if name == _TARGETS else ""
    choice = f", or to `{ALL_LINEAR}`" if name == _TARGETS else ", or to an empty list"
    return rules.NO_TARGETS(
        f"{context.method.peft_type} has no default `{name}` for {_model(context)}",
        fix=f"Set `{name}` to a list of names{choice}. {hint}".strip(),
        where=context.where(name),
    )
