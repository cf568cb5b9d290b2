"""`peftc apply`: carry a saved plan out on its base model and save the fresh adapter; a model that has drifted is refused."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from peftc import rules
from peftc.cli import console, progress
from peftc.cli.graph import base_named
from peftc.compiler.plan.drift import differences
from peftc.compiler.plan.files import read_plan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.serial import plan_digest
from peftc.config.sections import section_of_word
from peftc.diagnostics import PeftcError, Where
from peftc.graph.base_ref import BaseRef

HELP = "Apply a saved plan to its base model and save the fresh adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("plan", metavar="PLAN", type=Path, help="a plan that `peftc plan --out` wrote")
    parser.add_argument("--base", metavar="MODEL", help="the base model, or a spec that names it; left out, the plan's")
    parser.add_argument(
        "-o", "--out", metavar="DIR", type=Path, help="folder for the adapter; left out, nothing is saved"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the adapter's initial values")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Load, compare, apply, save, and print the counts."""
    plan = read_plan(args.plan)
    base = base_of(plan, args.base, args.plan)
    from peftc.integrations.transformers.base import load_base  # here: below the torch line
    from peftc.model.peft_model import PeftModel
    from peftc.runtime.applying.snapshot import snapshot

    with progress.stage("Loading the base model", quiet=args.quiet):
        model, _ = load_base(base)
    graph = snapshot(model)
    drifted = differences(plan, graph)
    if drifted:
        raise PeftcError([replace(d, where=Where(file=str(args.plan))) for d in drifted])
    import torch

    torch.manual_seed(args.seed)
    adapted = PeftModel.from_plan(model, replace(plan, graph=graph))
    trainable, total = adapted.get_nb_trainable_parameters()
    if args.out is not None:
        adapted.save_pretrained(args.out)
    if args.json:
        facts = {"plan": plan_digest(plan), "trainable": trainable, "total": total}
        console.out_json({"ok": True, **facts, "output": None if args.out is None else str(args.out)})
        return 0
    adapters = ", ".join(
        f"{a.name} ({a.peft_type}, {len(a.sites):,} {'modules' if a.modules else 'layers'})" for a in plan.adapters
    )
    saved = "Nothing saved: no --out given" if args.out is None else f"Saved to {args.out}"
    console.out(console.plain(f"Applied {adapters}: {trainable:,} of {total:,} parameters trainable. {saved}."))
    return 0


def base_of(plan: InjectionPlan, word: str | None, path: Path) -> BaseRef:
    """The base that is meant: the one named, as the plan wants it, or the plan's. Raises `PeftcError` without either."""
    if word is not None:
        task = plan.base.task_type if plan.base else None
        dtype = plan.base.dtype if plan.base else None
        return base_named(word, task, dtype)
    if plan.base is not None:
        return plan.base
    if plan.model.name_or_path:
        return BaseRef(**section_of_word(plan.model.name_or_path))
    what = "The plan does not say which base model it is for"
    raise PeftcError(rules.BASE_MISSING(what, fix="Name it with `--base`.", where=Where(file=str(path))))
