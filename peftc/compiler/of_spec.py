"""A spec's plan: its adapters compiled for its base, held to the spec's own checks."""

from __future__ import annotations

import os
from dataclasses import replace

from peftc import rules
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.sections import ChecksSection
from peftc.config.spec import AdapterSpec
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.base_ref import BaseRef
from peftc.graph.nodes import ModuleGraph
from peftc.registry.manager import Registry


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


def _failure(what: str, key: str) -> Diagnostic:
    fix = "Correct the targets, or the check if the plan is what you mean."
    return rules.CHECK_FAILED(what, fix=fix, where=f"$.checks.{key}")


def _anchored(base: BaseRef) -> BaseRef:
    """The base with local paths made absolute: a plan may be applied from another folder."""
    local = {"path": base.path, "gguf": base.gguf, "config": base.config}
    return replace(base, **{key: os.path.abspath(value) for key, value in local.items() if isinstance(value, str)})
