"""Values by row that methods read of a call: taken off its keywords, checked before anything is computed, and opened.

Which keywords these are is declared by the mathematics of the adapters (`MapTuner.keywords`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peftc import rules
from peftc.diagnostics import Collector, Diagnostic, PeftcError
from peftc.registry.boundary import guarded, is_out_of_memory
from peftc.runtime.call import Call, values_differ
from peftc.runtime.gates import FromToken
from peftc.runtime.session.beginnings import beginnings
from peftc.runtime.session.session import Session


def taken(session: Session, kwargs: MutableMapping[str, Any]) -> dict[str, Tensor]:
    """The values that adapters of the model read, taken off a call's keywords. Raises `PeftcError` for what is none."""
    wanted = dict.fromkeys(name for tuner in session.readers.values() for name in tuner.keywords)
    given = {name: kwargs.pop(name, None) for name in wanted}
    return {name: _as_values(name, value) for name, value in given.items() if value is not None}


def _as_values(name: str, value: Any) -> Tensor:
    """A value for each row; -1 for a row that has None."""
    if isinstance(value, (list, tuple)):
        value = [-1 if own is None else own for own in value]
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        found = torch.empty(0, 0)
    if found.dim() != 1 or found.is_floating_point() or found.is_complex():
        what = f"`{name}` is not a list of whole numbers"
        raise PeftcError(rules.ROW_VALUES(what, fix="Give a tensor or a list with one number for each row."))
    return found


def problems(
    session: Session, values: Mapping[str, Tensor], names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[Diagnostic]:
    """What is wrong with the values of a call, for the adapters of these names. A traced call is not looked at: numbers
    are not known yet."""
    rows = rows_of(args, kwargs)
    for name, value in values.items():
        if rows is not None and value.shape[0] != rows:
            yield values_differ(name, value.shape[0], rows, "the batch has")
    if torch.compiler.is_compiling():
        return
    for adapter in dict.fromkeys(names):
        tuner = session.readers.get(adapter)
        if tuner is not None:
            config = session.plans[adapter].config
            yield from guarded(tuner.check_call, str(config.peft_type), None)(config, values)


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of a call's batch: the first dimension of its first tensor."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
    return None if first is None else first.shape[0]


@contextmanager
def values_given(
    session: Session,
    values: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    expand: int = 1,
    prompt: bool = False,
) -> Iterator[FromToken | None]:
    """Within, the active adapters find the values; gives where those begin that wait for a token.

    `args` and `kwargs` are the rest of the call; `expand` is how often generation repeats each row, and with `prompt` its ids
    are those of a prompt. Raises `PeftcError` with every problem.
    """
    found = Collector()
    found.add(*problems(session, values, session.active if session.enabled else (), args, kwargs))
    found.raise_errors()
    names = session.active if session.enabled else ()
    gates = beginnings(session, names, values, args, kwargs, prompt=prompt)
    with session.shared.opened(Call((), expand, dict(values), gates)):
        yield gates
