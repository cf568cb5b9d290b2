"""`peftc convert`: an adapter of any method that changes weights as one of thin factors, with the error of each layer."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftc.cli import console, progress
from peftc.cli.generate import adapter_named
from peftc.cli.graph import base_named
from peftc.compiler.render import size

HELP = "Turn an adapter into one of another method, by its closest factors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--adapter", type=adapter_named, required=True, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--to", required=True, metavar="TYPE", help="the PEFT type to become, in any case")
    parser.add_argument(
        "--rank",
        type=_rank,
        required=True,
        metavar="R",
        help="rank of every layer, e.g. 16; or the share of each change to keep, e.g. 0.95, whatever ranks that takes",
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the result; new or empty"
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="the base model, or a spec that names it; left out, the adapter's"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _rank(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def run(args: argparse.Namespace) -> int:
    """Convert and save."""
    from peftc.checkpoint.save import save_adapter  # here: below the torch line
    from peftc.integrations.transformers import jobs
    from peftc.model.conversion import convert_adapter

    jobs.require_new(args.out)
    ref = base_named(args.base) if args.base is not None else jobs.base_of_adapter(args.adapter)
    with progress.stage("Loading the base model", quiet=args.quiet):
        base, _ = jobs.load_any(ref, jobs.device_named("cpu"))
        model = jobs.with_adapter(base, args.adapter)
    with progress.stage("Converting and saving", quiet=args.quiet):
        made = convert_adapter(model, args.to.upper(), args.rank)
        save_adapter(args.out, made.tensors, made.config)
    bytes_ = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    if args.json:
        layers = {path: {"rank": made.ranks[path], "error": error} for path, error in made.errors.items()}
        facts = {"output": str(args.out), "error": made.error, "layers": layers, "bytes": bytes_}
        console.out_json({"ok": True, "peft_type": args.to.upper(), **facts})
    else:
        rows = [(path, str(made.ranks[path]), f"{error:.2%}") for path, error in made.errors.items()]
        console.out(console.table(rows, ("LAYER", "RANK", "ERROR")))
        console.out(f"Converted into {console.plain(str(args.out))}: {size(bytes_)}, relative error {made.error:.2%}")
    return 0
