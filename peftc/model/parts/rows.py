"""Calls that name an adapter for each row of their batch: what is asked is checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import Collector, Diagnostic, PeftcError
from peftc.runtime.call import BASE, Call, rows_differ
from peftc.runtime.gates import FromToken
from peftc.runtime.session.beginnings import beginnings
from peftc.runtime.session.session import Session
from peftc.runtime.session.starts import changes_base, turning
from peftc.runtime.session.switched import disabled
from peftc.runtime.session.values import problems as of_values
from peftc.runtime.session.values import rows_of

#: the keyword that names adapters by row
ADAPTER_NAMES = "adapter_names"
NONE: Mapping[str, Tensor] = MappingProxyType({})


@contextmanager
def rows_named(
    session: Session,
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    expand: int = 1,
    values: Mapping[str, Tensor] = NONE,
    prompt: bool = False,
) -> Iterator[FromToken | None]:
    """Within, row `i` of a batch is computed with the adapter `names[i]`, or with the base model for `"__base__"`.

    Adapters need not be active; while all are disabled, every row is the base model's. `args` and `kwargs` are the call's; `expand` is
    how often generation repeats each row, whose `prompt` they then are; `values` are what adapters read of the call.
    Raises `PeftcError` with every problem: names that are not there, too many or too few, merged adapters, prompts.
    """
    problems = Collector()
    problems.add(*_problems(session, names, args, kwargs))
    problems.add(*of_values(session, values, names if session.enabled else (), args, kwargs))
    problems.raise_errors()
    session.let_rows_differ()
    if set(names) == {BASE}:
        with disabled(session):
            yield None
        return
    if not session.enabled:
        yield None
        return
    gates = beginnings(session, names, values, args, kwargs, by_row=True, prompt=prompt)
    with session.shared.opened(Call(tuple(names), expand, values, gates)):
        yield gates


def _problems(
    session: Session, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[Diagnostic]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        what = f"`{ADAPTER_NAMES}` is {names!r}, not a list of names"
        yield rules.ROWS_DIFFER(what, fix="Give a list with one name for each row.")
        return
    try:
        session.require(name for name in dict.fromkeys(names) if name != BASE)
    except PeftcError as error:
        yield from error.diagnostics
    if session.merged and set(names) != {BASE}:
        what = f"Merged adapters act on every row: {', '.join(f'`{name}`' for name in session.merged)}"
        yield rules.WHILE_MERGED(what, fix="Call `unmerge_adapter()` first.")
    for name, plan in session.plans.items():
        if plan.trains and set(names) != {BASE} and (set(names) != {name} or name not in session.active):
            what, why = f"`{name}` trains biases of the base model", "Every row is computed with them, or none."
            yield rules.CALL_NOT_POSSIBLE(what, why=why, fix="Call the model without row names.")
        if set(names) != {BASE} and (name in names or name in session.active) and changes_base(session, name):
            what, why = f"The start of `{name}` changed the base weights", "Every row is computed with them, or none."
            yield rules.CALL_NOT_POSSIBLE(what, why=why, fix=turning([name]))
        acts = name in names or (
            name in session.active and bool(plan.modules)
        )  # a wrapped module sees all rows at once
        if acts and not plan.nests:
            what = f"`{name}` adapts the whole call, not single rows"
            if plan.adapts_parameters:
                class_there = f"{str(plan.peft_type).lower()}.ParamWrapper"
                what = (
                    f"`{name}` adapts all tokens of a module: {class_there} does not support mixed adapter batches yet."
                )
            yield rules.CALL_NOT_POSSIBLE(what, why="Rows share one call.", fix="Call the model without row names.")
    rows = rows_of(args, kwargs)
    if rows is not None and rows != len(names):
        yield rows_differ(len(names), rows, "the batch has")


def expansion(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How often `generate` repeats each row: for beams, or for several answers."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    asked = (kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences"))
    return max(asked)
