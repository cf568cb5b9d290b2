"""What comes before an adapter is put on a live model: compiling its config, with what is applied already and what is given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.keys import unwrapped as segments_of
from peftc.compiler.compile import compile_plan, conflicts
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.sites import WRAPPED_ROOT
from peftc.config.base import PeftConfig
from peftc.config.mixins import TargetNamesMixin
from peftc.diagnostics import PeftcError, warn
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import session_of
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.bases.shards import note_adding
from peftc.runtime.bases.splits import refuse_unknown_splits
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.slots.filling import torch_dtype

#: Warnings about how training would start, which say nothing of an adapter that is loaded.
_OF_THE_START = frozenset({rules.NOT_IDENTITY.code})


def plan_for(
    model: nn.Module,
    configs: Mapping[str, PeftConfig],
    autocast_adapter_dtype: bool = True,
    loading: bool = False,
    task_heads: bool = True,
    given: Collection[str] | None = None,
    mixed: bool = False,
) -> InjectionPlan:
    """Compile configs for a live model and show the compiler's warnings; the first config's adapter is to be active,
    unless the model has adapters already; `given` are the paths to adapt, where they are known exactly. `mixed` lets
    methods nest. Raises `PeftcError` with every problem."""
    if not isinstance(model, nn.Module):
        what = f"A {type(model).__name__} is not a `torch.nn.Module`"
        raise PeftcError(rules.NOT_A_MODEL(what, fix="Give the model first, then the config."))
    refuse_unknown_splits(model)
    session = session_of(model)
    if session is None or not session.plans:
        note_adding(model, model.modules())
    plan = compile_plan(
        snapshot(model) if session is None else session.graph,
        configs,
        active=None if session is None else [],
        registry=default_registry(),
        autocast_adapter_dtype=autocast_adapter_dtype,
        task_heads=task_heads,
        given=given,
        mixed=mixed,
        loading=loading,
    )
    others = [] if session is None else [p for name, p in session.plans.items() if name not in configs]
    problems = conflicts([*others, *plan.adapters], mixed)
    if problems:
        raise PeftcError(problems)
    warn(w for w in plan.warnings if not loading or w.code not in _OF_THE_START)
    return plan


def paths_in(keys: Iterable[str], prefix: str) -> frozenset[str]:
    """Paths of the modules that a checkpoint's keys adapt: what stands before the last name with the method's prefix."""
    paths = set()
    for key in keys:
        segments = segments_of(key, WRAPPED_ROOT)
        at = [i for i, part in enumerate(segments) if part.startswith(prefix)]
        if at:
            paths.add(".".join(part for part in segments[: at[-1]] if part != "base_layer"))
    return frozenset(paths)


def targeted(config: PeftConfig, paths: Collection[str]) -> PeftConfig:
    """The config, saying which modules it adapts if it does not: what is saved has to be found again."""
    if isinstance(config, TargetNamesMixin) and config.target_modules is None:
        return config.model_copy(update={"target_modules": set(paths)})
    return config


def hollow(plan: AdapterPlan) -> Source:
    """Slots without memory, on the meta device, for an adapter whose values come later."""
    facts = {
        site.key(slot, plan.name).disk(): (slot.shape, torch_dtype(slot.dtype or site.dtype))
        for site, slot in plan.slots()
        if not slot.derived and slot.value is None
    }

    def find(key: str) -> Tensor | None:
        if key not in facts:
            return None
        shape, dtype = facts[key]
        return torch.empty(shape, dtype=dtype, device="meta")

    return find
