"""Planning in another process, from the config alone: how the checks know that a plan needs no model and no torch.

Run as `python -m peftc.testing.elsewhere` it reads jobs as JSON and prints what it planned. A job that brings a graph is
planned first, so that whatever imports torch then is the plugin's doing.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.diagnostics import PeftcError
from peftc.graph.base_ref import BaseRef
from peftc.graph.locate import locate
from peftc.graph.nodes import ModuleGraph
from peftc.registry.doors import record_of
from peftc.registry.manager import default_registry

if TYPE_CHECKING:
    from peftc.testing.subjects import Subject

#: What takes seconds to import and must not be needed before a model is loaded.
HEAVY = ("torch", "transformers", "numpy", "safetensors")


@dataclass(frozen=True)
class Planned:
    """What another process made of a subject: its plan, or why there is none; and what it had to import for it."""

    plan: InjectionPlan | None
    error: str = ""
    heavy: tuple[str, ...] = ()


def plan_elsewhere(subjects: Sequence[Subject], modules: Mapping[str, str]) -> dict[str, Planned]:
    """Plans of the subjects, by PEFT type and subject, made by another process.

    `modules` names, by PEFT type, the modules of plugins that are not installed. Raises `RuntimeError` with what the process
    said if it fails.
    """
    jobs = [_job(subject, modules.get(subject.method.peft_type)) for subject in subjects]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise RuntimeError(f"the process that plans failed:\n{run.stderr}")
    found = json.loads(run.stdout.splitlines()[-1])
    return {label: _read(job) for label, job in found.items()}


def _read(found: Mapping[str, Any]) -> Planned:
    plan = None if found["plan"] is None else plan_from_json(found["plan"])
    return Planned(plan, found["error"], tuple(found["heavy"]))


def label_of(subject: Subject) -> str:
    """What a subject's plan is filed under."""
    return f"{subject.method.peft_type} {subject}"


def _job(subject: Subject, module: str | None) -> dict[str, Any]:
    base = subject.model.base
    return {
        "label": label_of(subject),
        "type": subject.method.peft_type,
        "module": module,
        "config": subject.config().to_json(),
        "graph": None if base is not None else subject.model.graph.to_json(),
        "base": None if base is None else {"config": dict(base.config or {}), "task_type": base.task_type},  # type: ignore[arg-type]
    }


def _planned(job: Mapping[str, Any]) -> dict[str, Any]:
    before = set(sys.modules)
    plan, error = None, ""
    try:
        if job["module"]:
            _bring(job["module"])
        config = default_registry().get(job["type"]).config(**job["config"])
        plan = plan_to_json(compile_plan(_graph(job), {"default": config}))
    except PeftcError as problem:
        error = str(problem)
    brought = set(sys.modules) - before
    heavy = [] if job["graph"] is None else [name for name in HEAVY if name in brought]
    return {"plan": plan, "error": error, "heavy": heavy}


@cache
def _bring(module: str) -> None:
    """Make a plugin that is not installed known here, once."""
    record_of(importlib.import_module(module))


def _graph(job: Mapping[str, Any]) -> ModuleGraph:
    if job["graph"] is not None:
        return ModuleGraph.from_json(job["graph"])
    from peftc.integrations.transformers.graph import build_graph

    return build_graph(locate(BaseRef(**job["base"])))


def main() -> None:
    """Plan the jobs on standard input."""
    jobs = sorted(json.load(sys.stdin), key=lambda job: job["graph"] is None)
    print(json.dumps({job["label"]: _planned(job) for job in jobs}))


if __name__ == "__main__":
    main()
