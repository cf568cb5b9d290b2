"""A spec's plan: its adapters compiled for its base, held to the spec's own checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from peftc import rules
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.sections import ChecksSection
from peftc.config.spec import AdapterSpec
from peftc.diagnostics import Diagnostic, PeftcError, Where
from peftc.graph.base_ref import BaseRef
from peftc.graph.nodes import ModuleGraph
from peftc.registry.manager import Registry
from peftc.registry.optimizers import chosen_optimizer, unfit
from peftc.tuner.optimizer import NamedOptimizer, any_layer


def compile_spec(
    spec: AdapterSpec, graph: ModuleGraph, *, strict: bool = True, registry: Registry | None = None
) -> InjectionPlan:
    """The plan of a spec on a model of this graph.

    Raises `PeftcError` with every problem, and if the plan is not what the spec's `checks` say. `strict` is for what a
    person wrote; a config that a library wrote may have entries without effect.
    """
    plan = compile_plan(
        graph,
        spec.adapters,
        active=spec.active_names,
        strict=strict,
        allow_dead=spec.checks.allow_dead_targets if spec.checks else (),
        registry=registry,
    )
    failed = _failed_checks(plan, spec.checks) if spec.checks else []
    if spec.train is not None:
        record = chosen_optimizer(spec.train.optimizer, spec.train.optimizer_options, registry).record
        failed += (told for name in plan.active for told in optimizer_problems(record, plan.adapter(name)))
    if failed:
        raise PeftcError([*failed, *plan.warnings])
    return replace(plan, base=_anchored(spec.base_ref))


def _failed_checks(plan: InjectionPlan, checks: ChecksSection) -> list[Diagnostic]:
    """What the plan comes to, where the spec says otherwise."""
    failed = []
    modules = sum(len(plan.adapter(name).sites) for name in plan.active)
    if checks.expect_modules not in (None, modules):
        what = f"The active adapters adapt {modules:,} modules, not {checks.expect_modules:,}"
        failed.append(_failure(what, "expect_modules"))
    bounds = checks.trainable_bounds()
    trainable, _ = plan.counts()
    if bounds is not None and not bounds[0] <= trainable <= bounds[1]:
        what = f"The plan trains {trainable:,} parameters, not {checks.expect_trainable}"
        failed.append(_failure(what, "expect_trainable"))
    return failed


def optimizer_problems(record: NamedOptimizer, adapter: AdapterPlan) -> Iterator[Diagnostic]:
    """What keeps an optimiser from doing to an adapter what it is for."""
    where = Where(path="$.train.optimizer")
    fitting = [site for site in adapter.maps if record.fits(site.layer, site.slots)]
    if not fitting and record.fits is not any_layer:
        yield replace(unfit(record, adapter.name, adapter.peft_type).diagnostic, where=where)
    stacked = next((site for site in fitting if site.layer.experts), None)
    if stacked is not None and not record.takes_experts:
        what = f"`{record.name}` cannot move the factors of {stacked.layer.experts} experts together, as on `{stacked.path}`"
        fix = "Use another optimiser, or leave experts out (`target_parameters`)."
        yield rules.OPTIMIZER_MISFIT(what, fix=fix, where=where)


def _failure(what: str, key: str) -> Diagnostic:
    fix = "Correct the targets, or the check if the plan is what you mean."
    return rules.CHECK_FAILED(what, fix=fix, where=f"$.checks.{key}")


def _anchored(base: BaseRef) -> BaseRef:
    """The base with local paths made absolute: a plan may be applied from another folder."""
    local = {"path": base.path, "gguf": base.gguf, "config": base.config}
    whole: dict[str, Any] = {key: os.path.abspath(value) for key, value in local.items() if isinstance(value, str)}
    return replace(base, **whole)
