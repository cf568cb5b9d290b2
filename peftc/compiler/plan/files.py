"""Plans and graphs from their files: bounded, held to their schemas, every difference with its line."""

from __future__ import annotations

import os
from pathlib import Path

from peftc import rules
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.serial import plan_from_text
from peftc.config.json_text import parse_json
from peftc.config.kinds import hint_of
from peftc.config.problems import Problem, capped
from peftc.config.reader import read_text
from peftc.diagnostics import Diagnostic, PeftcError, Rule, Where
from peftc.graph.nodes import GRAPH_VERSION, READABLE, ModuleGraph
from peftc.limits import MAX_GRAPH, MAX_PLAN
from peftc.registry.manager import Registry
from peftc.schema.graph import graph_schema
from peftc.schema.structure import structure_problems

_YAML = (".yaml", ".yml")


def read_plan(path: str | os.PathLike[str], registry: Registry | None = None) -> InjectionPlan:
    """The plan in a file. Raises `PeftcError` if it cannot be read or is not a plan."""
    file = os.fspath(path)
    _refuse_yaml(file, rules.PLAN_INVALID, f"Make a plan first: `peftc plan {file} --out plan.json`.")
    return plan_from_text(read_text(file, MAX_PLAN), file, registry)


def read_graph(path: str | os.PathLike[str]) -> ModuleGraph:
    """The graph in a file. Raises `PeftcError` if it cannot be read or is not a graph of a version that is known."""
    file = os.fspath(path)
    fix = f"Write it again with `peftc graph MODEL --out FILE` (graph version {GRAPH_VERSION})."
    _refuse_yaml(file, rules.GRAPH_INVALID, fix)
    document = parse_json(read_text(file, MAX_GRAPH), file)

    def refused(what: str, problem: Problem | None = None) -> Diagnostic:
        where = Where(file=file) if problem is None else document.where(problem.location, problem.on_key)
        return rules.GRAPH_INVALID(what, fix=fix, where=where)

    data = document.data
    if not isinstance(data, dict) or not {"facts", "nodes"} <= data.keys():
        raise PeftcError(refused(f"It has no `facts` and `nodes` of a module graph{hint_of(data)}"))
    if data.get("version") not in READABLE:
        raise PeftcError(refused("It is a module graph of a version that is not known"))
    differs = [refused(p.diagnostic.what, p) for p in structure_problems(data, graph_schema(), exact=True)]
    if differs:
        raise PeftcError(capped(differs))
    try:
        return ModuleGraph.from_json(data)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise PeftcError(refused(f"Not a module graph: {error}")) from error


def _refuse_yaml(file: str, rule: Rule, fix: str) -> None:
    """Both are JSON, whatever the file is called; one that says it is YAML is a spec."""
    if Path(file).suffix.lower() in _YAML:
        raise PeftcError(rule("It is a YAML file, and this is JSON", fix=fix, where=Where(file=file)))
