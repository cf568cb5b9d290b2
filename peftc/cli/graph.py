"""`peftc graph`: the module graph of a model, as a summary or into a file that `peftc plan --graph` reads."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftc import rules
from peftc.cli import console
from peftc.config.sections import section_of_word
from peftc.config.types import TaskType
from peftc.diagnostics import Diagnostic, PeftcError, Where, warn
from peftc.graph.base_ref import BaseRef
from peftc.graph.files import write_graph
from peftc.graph.groups import grouped
from peftc.graph.nodes import LayerFacts, ModuleGraph, Role

HELP = "Write a model's module graph to a file"

_SPEC_ENDINGS = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a folder, config.json, GGUF file, cached hub id, or a spec")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, help="write the graph to this file")
    parser.add_argument("--task-type", choices=[str(task) for task in TaskType], help="decides the model class")
    parser.add_argument("--dtype", help="number format of the weights, e.g. bfloat16; left out, the config's")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print the graph as JSON")


def run(args: argparse.Namespace) -> int:
    """Print a summary, or the graph itself with `--json`, and write it with `--out`."""
    from peftc.integrations.transformers.graph import graph_of  # here: below the torch line

    graph = graph_of(base_named(args.model, args.task_type, args.dtype, args.revision))
    if args.out is not None:
        _write(graph, args.out)
        console.note(f"{args.out}: {len(graph.nodes):,} modules, {graph.numel:,} parameters", args.quiet)
    if args.json:
        console.out_json(graph.to_json())
    elif args.out is None:
        console.out(summary(graph))
    return 0


def base_named(
    word: str, task_type: str | None = None, dtype: str | None = None, revision: str | None = None
) -> BaseRef:
    """The base that a person means by one word, a spec's base included. Raises `PeftcError` if the spec is wrong."""
    if word.lower().endswith(_SPEC_ENDINGS):
        from peftc.config.spec import load_spec  # here, because most uses do not need it

        spec, warnings = load_spec(word)
        warn(warnings)
        base = spec.base_ref
    else:
        section: dict[str, Any] = section_of_word(os.path.expanduser(word))
        base = BaseRef(**section)
    said = {"task_type": task_type, "dtype": dtype, "revision": revision}
    given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    return replace(base, **given)


def summary(graph: ModuleGraph) -> str:
    """Modules with parameters, repeated ones as one line, and totals by role."""
    model = graph.model
    holders = [node for node in graph.nodes if node.facts.params]
    rows = [
        [group.pattern, f"×{group.count}" if group.count > 1 else "", *_described(*group.tag)]
        for group in grouped((node.path, (node.facts, node.role)) for node in holders)
    ]
    total = f"{graph.numel:,} parameters in {len(graph.nodes):,} modules"
    heads = ("module", "", "kind", "size", "dtype", "role")
    parts = [console.plain(f"{model.cls} ({model.model_type or 'no model type'}): {total}")]
    parts += [console.table(rows, heads), f"By role: {_by_role(graph)}"]
    parts += [f"Shared: {console.plain(' = '.join(names))}" for names in graph.ties]
    return "\n".join(parts)


def _described(facts: LayerFacts, role: Role | None) -> list[str]:
    kind = facts.cls if facts.kind == "other" else facts.kind.value
    if facts.in_features:
        size = f"{facts.in_features:,} → {facts.out_features:,}"
    else:
        size = ", ".join(f"{name} {'×'.join(map(str, tensor.shape)) or 1}" for name, tensor in facts.params.items())
    dtypes = dict.fromkeys(tensor.dtype for tensor in facts.params.values())
    return [kind, size, ", ".join(dtypes), role.value if role else ""]


def _by_role(graph: ModuleGraph) -> str:
    totals: Counter[str] = Counter()
    nodes = graph.by_path
    for name, tensor in graph.parameters():
        role = nodes[name.rpartition(".")[0]].role
        totals[role.value if role else "other"] += tensor.numel
    return ", ".join(f"{role} {count:,}" for role, count in totals.most_common())


def _write(graph: ModuleGraph, path: Path) -> None:
    try:
        write_graph(graph, path)
    except OSError as error:
        raise PeftcError(_unwritable(path, error)) from error


def _unwritable(path: Path, error: OSError) -> Diagnostic:
    fix = "Name a file in a folder that exists and can be written, with space left."
    return rules.SYSTEM_REFUSED(f"The graph was not written: {error.strerror}", fix=fix, where=Where(file=str(path)))
