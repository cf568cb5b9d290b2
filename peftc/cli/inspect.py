"""`peftc inspect`: what an adapter folder holds, without its base model: options, tensors, the plan that made it, its health.

Everything but the values is read without torch; the values are read unless `--header-only` is given.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peftc import rules
from peftc.checkpoint.load import AdapterFile, open_adapter
from peftc.checkpoint.names import PLAN_NAME
from peftc.checkpoint.report import match_file
from peftc.checkpoint.values import stored_problems
from peftc.cli import console
from peftc.cli.generate import adapter_named
from peftc.compiler.plan.files import read_plan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.render import percent, size
from peftc.config.base import CONFIG_NAME, PeftConfig
from peftc.config.files import plugin_named, read_config
from peftc.config.hub import is_repository
from peftc.diagnostics import Collector, PeftcError
from peftc.graph.groups import grouped

HELP = "Show what is in an adapter folder"

#: Options that have a line of their own, or say nothing about the adapter.
_TOLD_APART = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "auto_mapping",
}
T = TypeVar("T")


@dataclass
class Findings:
    """What could be read of a folder; a part is None if it is missing or wrong, and `problems` say why."""

    config: PeftConfig | None = None
    #: what must be installed for the method, where that is not peftc itself
    plugin: str | None = None
    weights: AdapterFile | None = None
    plan: InjectionPlan | None = None
    problems: Collector = field(default_factory=Collector)

    def attempt(self, read: Callable[[], T]) -> T | None:
        """What `read` gives, or None and its problems on the list."""
        try:
            return read()
        except PeftcError as error:
            self.problems.add(*error.diagnostics)
            return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("adapter", metavar="DIR", type=adapter_named, help="an adapter's folder")
    parser.add_argument(
        "--header-only", action="store_true", help="do not read the values, which takes time for a large adapter"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings. Exit code 1 if a part is missing or damaged."""
    found = look(args.adapter, values=not args.header_only)
    if args.json:
        console.out_json(_plain(found))
        return int(bool(found.problems.errors))
    for line in _told(found):
        console.out(line)
    if found.problems.errors:
        raise PeftcError(tuple(found.problems))
    if found.problems.warnings:
        console.show(found.problems.warnings)
    elif not args.header_only:
        console.out("Health    every value is finite, and no kind of tensor is zero throughout")
    return 0


def look(folder: str, values: bool) -> Findings:
    """Read a folder, part by part."""
    found = Findings()
    found.config = found.attempt(lambda: read_config(folder))
    with suppress(PeftcError):  # told already
        found.plugin = plugin_named(Path(folder, CONFIG_NAME))
    has_method = all(problem.code != rules.PLUGIN_MISSING.code for problem in found.problems)
    if found.config is None and not os.path.lexists(folder) and not is_repository(folder):
        return found  # there is nothing, which has been told
    found.weights = found.attempt(lambda: open_adapter(folder))
    plan_file = Path(folder, PLAN_NAME)
    if plan_file.is_file() and has_method:
        found.plan = found.attempt(lambda: read_plan(plan_file))
    if found.weights is not None and found.plan is not None and found.plan.adapters:
        plan, base = found.plan.adapters[0], found.plan.model
        embeddings = tuple(f"{plan.root}{path}." for path in (base.input_embeddings, base.output_embeddings) if path)
        carried = {key: facts for key, facts in found.weights.tensors.items() if key.startswith(embeddings)}
        found.problems.add(*match_file(plan, found.weights, base, carried).diagnostics)
    if found.weights is not None and values:
        found.problems.add(*stored_problems(found.weights))
    return found


def options(config: PeftConfig) -> dict[str, Any]:
    """The options that differ from their defaults."""
    data, fields = config.to_json(), type(config).model_fields
    defaults = {
        name: info.get_default(call_default_factory=True) for name, info in fields.items() if not info.is_required()
    }
    return {k: v for k, v in data.items() if k not in _TOLD_APART and v != defaults.get(k)}


def _told(found: Findings) -> list[str]:
    lines = []
    if found.config is not None:
        config = found.config
        facts = [
            str(config.peft_type),
            str(config.task_type or ""),
            f"written by {config.peft_version}" if config.peft_version else "",
        ]
        lines.append(f"Adapter   {', '.join(fact for fact in facts if fact)}")
        lines.append(f"Base      {config.base_model_name_or_path or 'not named'}")
        lines += [
            f"{'Options' if not i else '':<10}{k} = {_value(v)}" for i, (k, v) in enumerate(options(config).items())
        ]
    if found.plugin is not None:
        lines.append(f"Plugin    {found.plugin}")
    if found.weights is not None:
        rows = _tensor_rows(found.weights)
        lines.append(f"Tensors   {_totals(found.weights)}")
        lines.append("\n" + console.table(rows, ("tensor", "", "shape", "dtype", "numbers")) + "\n")
    if found.plan is not None:
        trainable, total = found.plan.counts()
        sites = sum(len(adapter.sites) for adapter in found.plan.adapters)
        lines.append(
            f"Plan      {PLAN_NAME}: {sites:,} modules, {trainable:,} of {total:,} parameters ({percent(trainable, total)})"
        )
    return [line if "\x1b" in line else console.plain(line) for line in lines]


def _tensor_rows(file: AdapterFile) -> list[Sequence[str]]:
    groups = grouped((key, (facts.shape, facts.dtype, facts.numel)) for key, facts in file.tensors.items())
    return [
        (
            group.pattern,
            f"×{group.count:,}",
            "×".join(map(str, group.tag[0])),
            group.tag[1],
            f"{group.count * group.tag[2]:,}",
        )
        for group in groups
    ]


def _totals(file: AdapterFile) -> str:
    numbers = sum(facts.numel for facts in file.tensors.values())
    dtypes = ", ".join(sorted({facts.dtype for facts in file.tensors.values()}))
    return f"{len(file.tensors):,} with {numbers:,} numbers of {dtypes}, {size(file.path.stat().st_size)}"


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _plain(found: Findings) -> dict[str, Any]:
    config, weights, plan = found.config, found.weights, found.plan
    data: dict[str, Any] = {"ok": not found.problems.errors, "diagnostics": [d.to_dict() for d in found.problems]}
    if config is not None:
        data["config"] = {
            "peft_type": config.peft_type,
            "base": config.base_model_name_or_path,
            "options": options(config),
        }
        data["config"] |= {"task_type": config.task_type, "peft_version": config.peft_version}
    if found.plugin is not None:
        data["plugin"] = found.plugin
    if weights is not None:
        numbers = sum(facts.numel for facts in weights.tensors.values())
        tensors = {key: {"shape": list(facts.shape), "dtype": facts.dtype} for key, facts in weights.tensors.items()}
        data["weights"] = {"tensors": tensors, "numbers": numbers, "bytes": weights.path.stat().st_size}
    if plan is not None:
        trainable, total = plan.counts()
        sites = sum(len(adapter.sites) for adapter in plan.adapters)
        data["plan"] = {"modules": sites, "trainable": trainable, "total": total}
    return data
