"""Configs that were handed over: a model shows the object itself, with what the compiler filled in, as the reference does."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

from torch import nn

from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import PeftConfig
from peftc.runtime.applying.apply import session_of
from peftc.runtime.journal import keep


def with_handed(plan: InjectionPlan, model: nn.Module, configs: Mapping[str, PeftConfig]) -> InjectionPlan:
    """The plan with the objects that were handed over in the place of the compiler's copies. They get what it filled in.

    Layers keep a copy: who changes the object afterwards changes what is saved, and not what is computed. An object that
    another adapter of the model shows already stays that one's.
    """
    session = session_of(model)
    taken = (
        [] if session is None else [id(other.config) for name, other in session.plans.items() if name not in configs]
    )
    adapters = (_with(adapter, configs.get(adapter.name), taken) for adapter in plan.adapters)
    return replace(plan, adapters=tuple(adapters))


def _with(adapter: AdapterPlan, config: PeftConfig | None, taken: list[int]) -> AdapterPlan:
    if config is None or id(config) in taken or type(config) is not type(adapter.config):
        return adapter
    keep(config)
    config.__dict__.update(deepcopy(adapter.config.__dict__))
    return replace(adapter, config=config)
