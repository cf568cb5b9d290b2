"""`peftc merge`: fold an adapter into its base model; the result is an ordinary model that needs no peftc."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.cli import console, progress
from peftc.cli.generate import adapter_named
from peftc.cli.graph import base_named
from peftc.compiler.plan.render import size
from peftc.diagnostics import Diagnostic, warn

if TYPE_CHECKING:
    from peftc.graph.base_ref import BaseRef

HELP = "Merge an adapter into its base model and save the result"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("folder", nargs="?", type=adapter_named, metavar="DIR", help="the adapter's folder")
    named.add_argument("--adapter", type=adapter_named, metavar="DIR", help="the same")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the merged model; new or empty"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model, or a spec that names it; left out, the adapter's. The files of a folder are patched one tensor at "
        "a time; where they cannot be, the model is built, and the command says why",
    )
    parser.add_argument(
        "--any-base", action="store_true", help="merge into a base with other weights than it was trained on"
    )
    parser.add_argument("--dtype", help="number format of the weights, e.g. bfloat16; left out, the base model's")
    parser.add_argument(
        "--untie", action="store_true", help="let input and output embeddings differ that are one tensor in the base"
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="save a plain model: of a base that is quantised, or was in training, with the weights that its packed ones stand "
        "for; left out, they are packed anew",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="of weights that are packed anew, print what each layer's rounding costs",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Merge and save."""
    from peftc.integrations.transformers.asked import base_of_adapter, require_new
    from peftc.integrations.transformers.patchable import NeedsModel

    args.adapter = args.adapter or args.folder
    require_new(args.out)
    ref = base_named(args.base) if args.base is not None else base_of_adapter(args.adapter)
    ref = ref if args.dtype is None else replace(ref, dtype=args.dtype)
    reason = ""
    try:
        facts = _by_files(args, ref)
        if args.dequantize:
            warn([_not_packed()])
    except NeedsModel as error:
        reason = str(error)
        console.note(f"The model is built: {console.plain(reason)}", args.quiet)
        facts = _in_memory(args, ref)
    bytes_ = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    if args.json:
        told = {"output": str(args.out), **facts, "built": bool(reason), "because": reason or None}
        console.out_json({"ok": True, **told, "bytes": bytes_})
    else:
        console.out(f"Merged into {console.plain(str(args.out))}: {facts['parameters']:,} parameters, {size(bytes_)}")
    return 0


def _by_files(args: argparse.Namespace, ref: BaseRef) -> dict[str, Any]:
    """Patch the base's files. Raises `NeedsModel` where that cannot be done."""
    from peftc.host.memory import keep_small
    from peftc.integrations.transformers import patchable, streaming

    keep_small()
    job = patchable.job_for(args.adapter, ref, args.untie)
    with progress.stage("Merging", job.nbytes, args.quiet, sizes=True) as stage:
        return asdict(streaming.merge(job, args.out, stage.at, any_base=args.any_base))


def _in_memory(args: argparse.Namespace, ref: BaseRef) -> dict[str, Any]:
    """Build the model, and merge into that."""
    from peftc.host.quantised import is_quantised
    from peftc.integrations.transformers import jobs  # here: below the torch line
    from peftc.runtime.applying.dequantizing import dequantize
    from peftc.runtime.bases import rounding

    with progress.stage("Loading the base model", quiet=args.quiet):
        base, tokenizer = jobs.load_any(ref, jobs.device_named("cpu"))
        if args.dequantize and not is_quantised(base):
            warn([_not_packed()])
        if args.dequantize:
            dequantize(base)
        model = jobs.with_adapter(base, args.adapter, any_base=args.any_base)
    with progress.stage("Merging and saving", quiet=args.quiet), rounding.told() as rounded:
        merged = jobs.merge(model, tokenizer, args.out, untie=args.untie)
    if args.verbose and not args.json:
        for path, part in rounded.parts.items():
            console.out(f"  {console.plain(path)}  {part:.1%} of the change lost to rounding")
    facts = {"parameters": merged.num_parameters(), "dtype": str(merged.dtype).removeprefix("torch.")}
    return {**facts, **({"rounding": rounded.parts} if rounded.parts else {})}


def _not_packed() -> Diagnostic:
    return rules.WITHOUT_EFFECT("`--dequantize` has no effect: the base is not quantised", fix="Leave it out.")
