"""Generation, as transformers does it: before each step it asks the model for the inputs of a call, and calls it.

Whoever has to be part of every step stands in two places: where the inputs are prepared, and where the model is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

#: How many of the newest ids a step computes; None for all. Since 5.2.
NEXT_LENGTH = "next_sequence_length"

Inputs = dict[str, Any]
Prepare = Callable[..., Inputs]


@contextmanager
def steps_prepared(model: nn.Module, prepared: Callable[[Prepare, Tensor, Inputs], Inputs]) -> Iterator[None]:
    """Within, `prepared(prepare, ids, keywords)` gives the inputs of each step, `prepare` being the model's own way.

    Relied on: generation calls `model.prepare_inputs_for_generation(ids, **keywords)` before every step, looks the function
    up on the model, and calls the model with what it returns (since 4.0; models override it).
    """
    prepare: Any = model.prepare_inputs_for_generation

    @wraps(prepare)  # generation reads the signature, to know which keywords it may be given
    def replaced(input_ids: Tensor, **kwargs: Any) -> Inputs:
        return prepared(prepare, input_ids, kwargs)

    with _replaced(model, "prepare_inputs_for_generation", replaced):
        yield


@contextmanager
def calls_watched(
    model: nn.Module, before: Callable[[Mapping[str, Any]], None], after: Callable[[Mapping[str, Any]], None]
) -> Iterator[None]:
    """Within, both functions are shown the keywords of every call of the model: before anything is computed, and after."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before(kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        after(kwargs)

    handles = (
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_replaced(model: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Within, `answer(forward, args, kwargs)` answers every call of the model.

    Relied on: generation calls the model, and a model's call looks `forward` up on the instance.
    """
    forward = model.forward

    @wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return answer(forward, args, kwargs)

    with _replaced(model, "forward", replaced):
        yield


@contextmanager
def _replaced(model: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within, the model has another function under a name; afterwards what it had before."""
    own = vars(model)
    before = own.get(name)
    own[name] = function
    try:
        yield
    finally:
        del own[name]
        if before is not None:
            own[name] = before
