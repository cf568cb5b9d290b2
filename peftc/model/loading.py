"""What comes before adapters are applied: compiling for a live model, and opening what is to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.load import AdapterFile, open_adapter
from peftc.checkpoint.report import LoadReport, match_file
from peftc.compiler.compile import compile_plan, conflicts
from peftc.compiler.plan import AdapterPlan, InjectionPlan
from peftc.config.base import PeftConfig
from peftc.config.files import read_config
from peftc.diagnostics import PeftcError, warn
from peftc.registry.manager import default_registry
from peftc.runtime.apply import session_of
from peftc.runtime.layer import Source
from peftc.runtime.snapshot import snapshot

#: Warnings about how training would start, which say nothing of an adapter that is loaded.
_OF_THE_START = frozenset({rules.NOT_IDENTITY.code})


def plan_for(
    model: nn.Module,
    configs: Mapping[str, PeftConfig],
    autocast_adapter_dtype: bool = True,
    loading: bool = False,
    task_heads: bool = True,
) -> InjectionPlan:
    """Compile configs for a live model and show the compiler's warnings; the first config's adapter is to be active,
    unless the model has adapters already. Raises `PeftcError` with every problem."""
    if not isinstance(model, nn.Module):
        what = f"A {type(model).__name__} is not a `torch.nn.Module`"
        raise PeftcError(rules.NOT_A_MODEL(what, fix="Give the model first, then the config."))
    session = session_of(model)
    plan = compile_plan(
        snapshot(model) if session is None else session.graph,
        configs,
        active=None if session is None else [],
        registry=default_registry(),
        autocast_adapter_dtype=autocast_adapter_dtype,
        task_heads=task_heads,
    )
    others = [] if session is None else [p for name, p in session.plans.items() if name not in configs]
    problems = conflicts([*others, *plan.adapters])
    if problems:
        raise PeftcError(problems)
    warn(w for w in plan.warnings if not loading or w.code not in _OF_THE_START)
    return plan


def opened(
    model_id: str | Path, config: PeftConfig | None, is_trainable: bool, options: Mapping[str, Any]
) -> tuple[PeftConfig, AdapterFile]:
    """Config and weights of an adapter folder, or of a repository of the hub."""
    config = config or read_config(model_id, **options)
    config.inference_mode = not is_trainable
    return config, open_adapter(model_id, **options)


def matched(plan: AdapterPlan, file: AdapterFile, model: InjectionPlan) -> tuple[Source, LoadReport]:
    """Where each planned tensor comes from. Raises `PeftcError` if one does not fit or none would be loaded."""
    report = match_file(plan, file, model.model).require()

    def find(key: str) -> Tensor | None:
        stored = report.sources.get(key)
        return None if stored is None else file.tensor(stored)

    return find, report
