"""`peftc convert`: an adapter as one of another method, with the error of each layer, or in another form of file."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftc import rules
from peftc.cli import console, progress
from peftc.cli.generate import adapter_named
from peftc.cli.graph import base_named
from peftc.compiler.plan.render import size
from peftc.diagnostics import PeftcError

HELP = "Turn an adapter into one of another method, or its file into another form"

SAFETENSORS = "safetensors"
#: Layouts of experts: single layers with the names of then, or the parameters that a model has now.
FORMER, TODAY = "transformers-4", "transformers-5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("folder", nargs="?", type=adapter_named, metavar="DIR", help="the adapter's folder")
    named.add_argument("--adapter", type=adapter_named, metavar="DIR", help="the same")
    parser.add_argument(
        "--to",
        required=True,
        metavar="WHAT",
        help=f"the PEFT type to become, in any case; or `{SAFETENSORS}`, for an `adapter_model.bin`, whose tensors are read "
        f"without running its code; or `{FORMER}`, for engines that know experts as single layers with their old names, "
        f"or `{TODAY}`, for those that know them as they are now",
    )
    parser.add_argument(
        "--rank",
        type=_rank,
        metavar="R",
        help="for a PEFT type: rank of every layer, e.g. 16; or the share of each change to keep, e.g. 0.95, whatever ranks "
        "that takes",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for the result; new or empty. `{SAFETENSORS}` goes beside the pickle without it",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="the base model, or a spec that names it; left out, the adapter's"
    )
    parser.add_argument(
        "--any-base", action="store_true", help="convert it on a base with other weights than it was trained on"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _rank(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def run(args: argparse.Namespace) -> int:
    """Convert and save."""
    args.adapter = args.adapter or args.folder
    if args.to.lower() == SAFETENSORS:
        return _to_safetensors(args)
    if args.to.lower() in (FORMER, TODAY):
        return _to_layout(args)
    lacking = [word for word, given in (("--rank", args.rank), ("--out", args.out)) if given is None]
    if lacking:
        what = f"`--to {args.to}` needs {' and '.join(f'`{word}`' for word in lacking)}"
        fix = f"Give {'it' if len(lacking) == 1 else 'them'}, e.g. `--rank 16 --out converted`."
        raise PeftcError(rules.MISSING_KEY(what, fix=fix, where="peftc convert"))
    return _to_method(args)


def _to_safetensors(args: argparse.Namespace) -> int:
    from peftc.checkpoint.names import WEIGHTS_NAME
    from peftc.checkpoint.pickled import pickle_to_safetensors  # here: below the torch line
    from peftc.integrations.transformers.asked import require_new

    if args.out is not None:
        require_new(args.out)
    tensors = pickle_to_safetensors(Path(args.adapter), args.out)
    file = (args.out or Path(args.adapter)) / WEIGHTS_NAME
    if args.json:
        console.out_json({"ok": True, "output": str(file), "tensors": len(tensors), "bytes": file.stat().st_size})
    else:
        console.out(f"Wrote {console.plain(str(file))}: {len(tensors):,} tensors, {size(file.stat().st_size)}")
    return 0


def _to_layout(args: argparse.Namespace) -> int:
    from peftc.checkpoint.former_layout import as_of_then, as_of_today  # here: below the torch line
    from peftc.checkpoint.load import open_adapter
    from peftc.checkpoint.save import save_adapter
    from peftc.config.files import read_config
    from peftc.integrations.transformers.asked import base_of_adapter, require_new
    from peftc.integrations.transformers.graph import graph_of

    if args.out is None:
        what = f"`--to {args.to}` needs `--out`"
        raise PeftcError(rules.MISSING_KEY(what, fix="Name a new folder.", where="peftc convert"))
    require_new(args.out)
    ref = base_named(args.base) if args.base is not None else base_of_adapter(args.adapter)
    write, told = (as_of_then, "4") if args.to.lower() == FORMER else (as_of_today, "5")
    made = write(read_config(args.adapter), open_adapter(args.adapter), graph_of(ref))
    save_adapter(args.out, made.tensors, made.config)
    bytes_ = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    if args.json:
        console.out_json({"ok": True, "output": str(args.out), "tensors": len(made.tensors), "bytes": bytes_})
    else:
        content = f"{len(made.tensors):,} tensors, {size(bytes_)}"
        console.out(f"Wrote {console.plain(str(args.out))} for the layers of transformers {told}: {content}")
    return 0


def _to_method(args: argparse.Namespace) -> int:
    from peftc.checkpoint.save import save_adapter  # here: below the torch line
    from peftc.integrations.transformers import jobs
    from peftc.integrations.transformers.asked import base_of_adapter, require_new
    from peftc.model.functions.conversion import convert_adapter
    from peftc.model.parts import identity

    require_new(args.out)
    ref = base_named(args.base) if args.base is not None else base_of_adapter(args.adapter)
    with progress.stage("Loading the base model", quiet=args.quiet):
        base, _ = jobs.load_any(ref, jobs.device_named("cpu"))
        model = jobs.with_adapter(base, args.adapter, any_base=args.any_base)
    with progress.stage("Converting and saving", quiet=args.quiet):
        made = convert_adapter(model, args.to.upper(), args.rank)
        save_adapter(args.out, made.tensors, made.config, base=identity.print_of(model.session))
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
