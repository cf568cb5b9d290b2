"""Running an operation again and again, with a failure at another place each time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from peftc.diagnostics import PeftcError
from peftc.testing.subjects import quiet
from tests.faults.injection import FAILURES, Fault, Place, calls
from tests.faults.operations import Operation
from tests.faults.picture import differences, elsewhere, picture

Inject = Callable[[Fault], AbstractContextManager[Fault]]


def counted(operation: Operation, inject: Inject = calls) -> list[Place]:
    """The places of a run; none if the method refuses the operation."""
    with quiet():
        try:
            model, fault = operation.begin(), Fault()
            with inject(fault):
                operation.act(model)
        except PeftcError:
            return []
    return fault.places


def new(places: list[Place], seen: set[tuple[Place, bool]]) -> Iterator[int]:
    """Numbers of places where code comes by for the first time or for the last, unless others have been there so."""
    first, last = {}, {}
    for number, place in enumerate(places, 1):
        first.setdefault(place, number)
        last[place] = number
    chosen = {number: (place, False) for place, number in first.items()}
    chosen |= {number: (place, True) for place, number in last.items() if first[place] != number}
    for number, key in sorted(chosen.items()):
        if key not in seen:
            seen.add(key)
            yield number


def failed(operation: Operation, numbers: Iterable[int], inject: Inject = calls, failures: Any = None) -> Iterator[str]:
    """What went wrong after a failure at each of these places: nothing, if the model was as before each time, or if the
    operation went on and is done as without the failure.

    A place that is not reached this time, or at which Python takes no exception (a destructor), is passed over.
    """
    with quiet(), swallowed() as lost:
        model = operation.begin()
        before = picture(model)
        for number in numbers:
            for failure in failures or (FAILURES[number % len(FAILURES)],):
                fault, notes, raised = Fault(number, failure), [], False
                torch.default_generator.manual_seed(0)
                try:
                    with inject(fault):
                        operation.act(model)
                except BaseException as error:
                    if not fault.where:
                        raise
                    raised, notes = True, getattr(error, "__notes__", [])
                if not fault.where or lost:
                    lost.clear()
                    model = operation.begin()
                    before = picture(model)
                    continue
                told = [*differences(before, picture(model)), *notes] if raised else unfinished(operation, model)
                if told or not raised:
                    yield from (
                        [f"{failure.__name__} at place {number}, {fault.where}: {'; '.join(told)}"] if told else ()
                    )
                    model = operation.begin()
                    before = picture(model)


def unfinished(operation: Operation, model: object) -> list[str]:
    """What is not as after an operation without a failure, where that was no reason to give it up."""
    other = operation.begin()
    torch.default_generator.manual_seed(0)
    operation.act(other)
    is_done = elsewhere(picture(model)) == elsewhere(picture(other))
    return [] if is_done else ["nothing was raised, and the operation is not done"]


@contextmanager
def swallowed() -> Iterator[list[object]]:
    """What Python could raise nowhere."""
    lost: list[object] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda found: lost.append(found.exc_type)
    try:
        yield lost
    finally:
        sys.unraisablehook = before
