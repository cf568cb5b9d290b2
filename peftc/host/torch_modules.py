"""torch: what modules keep to themselves, read where asking by a call would cost as much as a small product."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch.utils.checkpoint
from torch import nn
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks, _global_forward_hooks

#: Hooks of every module: torch changes these dictionaries in place (2.0).
GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = (
    _global_forward_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)


def own_hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Hooks that see a module's output: its dictionaries, which torch changes in place (2.0)."""
    return module._forward_hooks, module._backward_hooks, module._backward_pre_hooks


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
