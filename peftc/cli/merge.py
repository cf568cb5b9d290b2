"""`peftc merge`: fold an adapter into its base model; the result is an ordinary model that needs no peftc."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from peftc.cli import console, progress
from peftc.cli.generate import adapter_named
from peftc.cli.graph import base_named
from peftc.compiler.plan.render import size

HELP = "Merge an adapter into its base model and save the result"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--adapter", type=adapter_named, required=True, metavar="DIR", help="the adapter's folder")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the merged model; new or empty"
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="the base model, or a spec that names it; left out, the adapter's"
    )
    parser.add_argument(
        "--any-base", action="store_true", help="merge into a base with other weights than it was trained on"
    )
    parser.add_argument("--dtype", help="number format of the weights, e.g. bfloat16; left out, the base model's")
    parser.add_argument(
        "--untie", action="store_true", help="let input and output embeddings differ that are one tensor in the base"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Merge and save."""
    from peftc.integrations.transformers import jobs  # here: below the torch line

    jobs.require_new(args.out)
    ref = base_named(args.base) if args.base is not None else jobs.base_of_adapter(args.adapter)
    ref = ref if args.dtype is None else replace(ref, dtype=args.dtype)
    with progress.stage("Loading the base model", quiet=args.quiet):
        base, tokenizer = jobs.load_any(ref, jobs.device_named("cpu"))
        model = jobs.with_adapter(base, args.adapter, any_base=args.any_base)
    with progress.stage("Merging and saving", quiet=args.quiet):
        merged = jobs.merge(model, tokenizer, args.out, untie=args.untie)
    bytes_ = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    if args.json:
        facts = {
            "output": str(args.out),
            "parameters": merged.num_parameters(),
            "dtype": str(merged.dtype).removeprefix("torch."),
        }
        console.out_json({"ok": True, **facts, "bytes": bytes_})
    else:
        console.out(
            f"Merged into {console.plain(str(args.out))}: {merged.num_parameters():,} parameters, {size(bytes_)}"
        )
    return 0
