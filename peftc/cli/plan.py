"""`peftc plan`: what a spec would adapt, from the model's graph alone; as text, as JSON to apply later, or for one module."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from peftc import rules
from peftc.cli import console
from peftc.compiler.explain import Explanation, explain, render_explanation
from peftc.compiler.of_spec import compile_spec
from peftc.compiler.plan.files import read_graph
from peftc.compiler.plan.mesh import Share, read_mesh, share_of
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.render import render_plan, render_share
from peftc.compiler.plan.serial import plan_to_text
from peftc.config.base import CONFIG_NAME
from peftc.config.places import Document, Location, json_path
from peftc.config.reader import read_document
from peftc.config.spec import AdapterSpec, is_config, load_spec
from peftc.diagnostics import Diagnostic, PeftcError, Where
from peftc.graph.files import replace_file
from peftc.graph.nodes import ModuleGraph
from peftc.registry.optimizers import chosen_optimizer

HELP = "Show what a spec would adapt, before any weight is loaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("spec", metavar="SPEC", help="a spec, an adapter config, or a folder with one")
    parser.add_argument("--base", metavar="MODEL", help="the base model, for an adapter config that names none")
    parser.add_argument("--graph", metavar="FILE", type=Path, help="a graph from `peftc graph`, instead of the base's")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="what to print")
    parser.add_argument("--json", action="store_true", help="the same as `--format json`")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, help="write the plan as JSON, for `peftc apply`")
    besides = parser.add_mutually_exclusive_group()
    besides.add_argument("--mesh", metavar="AXES", help="also what each of many processes holds: `fsdp=8,tp=2`")
    besides.add_argument("--explain", metavar="MODULE", help="what each pass did to one module, adapted or not")


def run(args: argparse.Namespace) -> int:
    """Print the plan, or the explanation of one module, and write the plan with `--out`."""
    args.json = args.json or args.format == "json"  # problems are then JSON too
    mesh = None if args.mesh is None else read_mesh(args.mesh)
    file = Path(args.spec) / CONFIG_NAME if Path(args.spec).is_dir() else Path(args.spec)
    spec, said = load_spec(file, base=args.base)
    graph = _graph(spec, args.graph)
    if args.explain is not None:
        _show_explanations([explain(graph, name, c, args.explain) for name, c in spec.adapters.items()], args.json)
        return 0
    try:
        plan = compile_spec(spec, graph, strict=file.name != CONFIG_NAME)
    except PeftcError as error:
        raise PeftcError(_merged(said, _placed(error.diagnostics, read_document(file)))) from None
    if args.out is not None:
        _write(plan, args.out)
        console.note(f"Wrote the plan to {args.out}", args.quiet)
    train = spec.train
    optimizer = None if train is None else chosen_optimizer(train.optimizer, train.optimizer_options)
    share = None if mesh is None else share_of(plan, mesh, optimizer)
    if args.json:
        _show_json(plan, share)
        return 0
    warnings = _merged(said, _placed(plan.warnings, read_document(file)) if plan.warnings else ())
    console.out(render_plan(replace(plan, warnings=tuple(warnings)), _paint, optimizer).rstrip("\n"))
    if share is not None:
        console.out("\n" + render_share(share, _paint, optimizer).rstrip("\n"))
    return 0


def _graph(spec: AdapterSpec, file: Path | None) -> ModuleGraph:
    if file is not None:
        return read_graph(file)
    from peftc.integrations.transformers.graph import graph_of  # here: below the torch line

    return graph_of(spec.base_ref)


def _paint(text: str, *styles: str) -> str:
    return console.paint(console.plain(text), *styles) if styles else console.plain(text)


def _show_json(plan: InjectionPlan, share: Share | None) -> None:
    """The plan; asked for the share of a process, that alone: a plan is the same for any number of them."""
    if share is None:
        console.out(plan_to_text(plan).rstrip("\n"))
        return
    memory = {**asdict(share.cost), "training": share.cost.training}
    mesh = {**asdict(share.mesh), "ranks": share.mesh.ranks}
    console.out_json({"mesh": mesh, "bytes_each": memory, "assumed": list(share.assumed)})


def _show_explanations(explanations: list[Explanation], as_json: bool) -> None:
    if as_json:
        console.out_json([asdict(explanation) for explanation in explanations])
        return
    for explanation in explanations:
        console.out(console.plain(render_explanation(explanation)))


def _write(plan: InjectionPlan, path: Path) -> None:
    try:
        replace_file(path, plan_to_text(plan).encode())
    except OSError as error:
        what = f"The plan was not written: {error.strerror or error}"
        fix = "Name a file in a folder that exists and can be written, with space left."
        raise PeftcError(rules.SYSTEM_REFUSED(what, fix=fix, where=Where(file=str(path)))) from error


def _merged(said: Iterable[Diagnostic], found: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Diagnostics of reading and of compiling, each once: both ask the method about its options."""
    return list({(d.code, d.what): d for d in (*found, *said)}.values())


def _placed(found: Iterable[Diagnostic], document: Document) -> list[Diagnostic]:
    """The compiler's diagnostics, which know the path in the spec, with their lines in the file."""
    places: dict[str, Location] = {json_path(place): place for place in document.positions.values}
    return [_with_line(diagnostic, document, places) for diagnostic in found]


def _with_line(diagnostic: Diagnostic, document: Document, places: dict[str, Location]) -> Diagnostic:
    path = diagnostic.where.path
    if path is None or not path.startswith("$"):
        return replace(diagnostic, where=replace(diagnostic.where, file=document.file))
    if is_config(document):  # a config alone is the options of the adapter `default`
        path = path.replace("$.adapters.default", "$", 1)
    location = max((place for text, place in places.items() if _leads_to(text, path)), key=len, default=())
    return replace(diagnostic, where=replace(document.where(_entry(document, location, path)), path=path))


def _leads_to(text: str, path: str) -> bool:
    return path == text or path.startswith((f"{text}.", f"{text}["))


def _entry(document: Document, location: Location, path: str) -> Location:
    """The place of an entry of a list that the path names by its text; the list's own place if there is none."""
    value = document.data
    for part in location:
        value = value[part]
    entries = value if isinstance(value, list) else []
    found = (i for i, entry in enumerate(entries) if isinstance(entry, str) and json_path((*location, entry)) == path)
    index = next(found, None)
    return location if index is None else (*location, index)
