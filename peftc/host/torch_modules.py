"""torch: what modules keep to themselves, read where asking by a call would cost as much as a small product."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
    register_module_module_registration_hook,
)
from torch.overrides import _pop_mode

#: Hooks of every module: torch changes these dictionaries in place (2.0).
GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = (
    _global_forward_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)
#: Those that a forward without gradients runs.
GLOBAL_FORWARD_HOOKS: tuple[Mapping[int, Any], ...] = (_global_forward_hooks, _global_forward_pre_hooks)


def leave_contexts(depth: int) -> None:
    """Leave contexts of function modes, such as `with torch.device(…)`, that nobody left, down to so many of them. Relied on:
    each is one entry of a stack of torch's (2.0)."""
    while context_depth() > depth:
        _pop_mode()


def context_depth() -> int:
    """How many such contexts are open."""
    return _len_torch_function_stack()


def own_hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Hooks that see a module's output: its dictionaries, which torch changes in place (2.0)."""
    return module._forward_hooks, module._backward_hooks, module._backward_pre_hooks


def forward_hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Hooks that run where nothing is differentiated, likewise."""
    return module._forward_hooks, module._forward_pre_hooks


def all_hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Hooks that see what a module gets and gives, likewise."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def computed_by(module: nn.Module) -> Collection[str]:
    """Names of tensors that a module computes from others. Relied on: a parametrized module has `parametrizations` (1.9)."""
    found = module._modules.get("parametrizations")
    return () if found is None else tuple(found._modules)


def transient_buffers(module: nn.Module) -> Collection[str]:
    """Names of buffers that are not saved. Relied on: `_non_persistent_buffers_set` (1.5)."""
    return module._non_persistent_buffers_set


@contextmanager
def counted_modules(most: int, refusal: Callable[[], Exception]) -> Iterator[None]:
    """Within, no more modules than `most` are put into others: the next one raises `refusal()` out of the constructor.

    Relied on: every module that becomes another's child is told to the hooks of registration (2.0).
    """
    count = 0

    def counted(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise refusal()

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


class KeepsAside(nn.Module):
    """A module with parameters that are no part of the model for now, and are cast and moved with it all the same.

    Relied on: `to`, `half`, `cuda`, `to_empty` and the like all come down to `_apply(function, recurse)` of every module,
    which works on `_parameters` (1.0).
    """

    def __init__(self) -> None:
        super().__init__()
        #: parameters that others stand in for, and those that stood in for others; of packed weights whatever holds them
        self._pristine: dict[str, Any] = {}
        self._folded: dict[str, Any] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for kept in (self._pristine, self._folded):
            beside = nn.Module()
            own = {name: held for name, held in kept.items() if held is None or isinstance(held, nn.Parameter)}
            beside.__dict__["_parameters"] = own
            if own:
                beside._apply(fn)
                kept.update(own)
        return super()._apply(fn, recurse)


@cache
def checkpoints_call(rebound: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """From now on, torch's two checkpoints run, and repeat, `rebound(function)` in place of a function.

    Relied on: models hold references to `torch.utils.checkpoint.checkpoint` itself, which calls
    `CheckpointFunction.forward(ctx, function, …)` or `_checkpoint_without_reentrant_generator(function, …)` (2.1).
    """
    module = torch.utils.checkpoint
    forward, generator = module.CheckpointFunction.forward, module._checkpoint_without_reentrant_generator

    def reentrant(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, rebound(run_function), *args)  # type: ignore[no-untyped-call]  # torch's own

    def other(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(rebound(fn), *args, **kwargs)

    module.CheckpointFunction.forward = staticmethod(reentrant)  # type: ignore[method-assign, assignment]
    module.__dict__["_checkpoint_without_reentrant_generator"] = other
