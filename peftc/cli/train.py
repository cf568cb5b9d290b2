"""`peftc train`: train the adapter of a spec and save it, repeatably, with checkpoints to go on from."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.checkpoint.names import WEIGHTS_NAME
from peftc.cli import console, progress
from peftc.compiler.plan.render import percent, size
from peftc.config.sections import TrainSection
from peftc.config.spec import AdapterSpec, load_spec
from peftc.diagnostics import PeftcError, Where, warn

if TYPE_CHECKING:
    from peftc.integrations.transformers.jobs import Base
    from peftc.integrations.transformers.training import TrainResult
    from peftc.model.peft_model import PeftModel

HELP = "Train the adapter of a spec and save it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("spec", metavar="SPEC", help="a spec with a `train` section")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="folder for the adapter; left out, the spec's `output`"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of initialisation, order and dropout, instead of the spec's"
    )
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:1, mps or xpu, instead of the spec's")
    parser.add_argument("--max-steps", type=int, metavar="N", help="number of steps, instead of the spec's")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train, save, and print what came of it."""
    spec, warnings = load_spec(args.spec)
    warn(warnings)
    how = section(spec, args.spec, seed=args.seed, device=args.device, steps=args.max_steps)
    folder = output_folder(spec, args.spec, args.output)

    from peftc.integrations.transformers import generation, jobs  # here: below the torch line

    device = jobs.device_named(how.device)
    with progress.stage("Loading the base model", quiet=args.quiet):
        base = jobs.load(spec.base_ref, device)
    rows = jobs.encoded(base, spec.resolve(how.data), how.max_length)
    held_out = jobs.encoded(base, spec.resolve(how.eval_data), how.max_length) if how.eval_data else []
    model = jobs.fresh_adapter(base, spec, how.seed, rows, how.batch_size)
    console.note(described(spec, base, model, len(rows)), args.quiet)
    before = generation.mean_loss(model, held_out, base.pad) if held_out else None
    try:
        with progress.stage("Training", total_steps(how, len(rows)), args.quiet) as stage:
            result = jobs.train(
                model,
                base,
                rows,
                how.model_copy(update={"device": str(device)}),
                folder,
                resume=args.resume,
                samples=jobs.read_by_starts(spec),
                progress=lambda step: stage.at(step.number, f"loss {step.loss:.3f}"),
            )
    except KeyboardInterrupt:
        console.note(_interrupted(folder, args.spec), args.quiet)
        raise
    after = generation.mean_loss(model, held_out, base.pad) if held_out else None
    _report(args.json, folder, model, result, (before, after))
    return 0


def section(spec: AdapterSpec, file: str, *, seed: int | None, device: str | None, steps: int | None) -> TrainSection:
    """The spec's `train` section with what the command line says instead. Raises `PeftcError` if there is none."""
    if spec.train is None:
        fix = "Add `train:` with `data:`, a JSON Lines file."
        raise PeftcError(rules.NOTHING_TO_TRAIN(f"`{file}` has no `train` section", fix=fix, where=Where(file=file)))
    given: dict[str, Any] = {"seed": seed, "device": device, "steps": steps}
    changed = {key: value for key, value in given.items() if value is not None}
    if steps is not None:
        changed["epochs"] = None
    return TrainSection(**{**spec.train.model_dump(), **changed})


def output_folder(spec: AdapterSpec, file: str, given: Path | None) -> Path:
    """Where the adapter is saved. Raises `PeftcError` if neither the command line nor the spec says it."""
    if given is not None:
        return given
    if spec.output is None:
        what = "Nothing says where to save the adapter"
        raise PeftcError(
            rules.NOTHING_TO_TRAIN(what, fix="Add `output:` to the spec, or give `--output`.", where=Where(file=file))
        )
    return spec.resolve(spec.output)


def described(spec: AdapterSpec, base: Base, model: PeftModel, examples: int) -> str:
    """What is about to be trained, in three lines."""
    trainable, total = model.get_nb_trainable_parameters()
    names = ", ".join(f"{name} ({spec.adapters[name].peft_type})" for name in spec.active_names)
    return "\n".join(
        [
            f"Base      {spec.base_ref.name or 'from a config'}, {total - trainable:,} parameters, on {base.model.device}",
            f"Adapter   {names}, {trainable:,} trainable parameters ({percent(trainable, total)})",
            f"Data      {examples:,} examples",
        ]
    )


def total_steps(how: TrainSection, examples: int) -> int:
    """Optimiser steps of a whole training."""
    if how.steps is not None:
        return how.steps
    per_epoch = math.ceil(math.ceil(examples / how.batch_size) / how.gradient_accumulation)
    return math.ceil((how.epochs or 1) * per_epoch)


def adapter_bytes(folder: Path) -> int:
    """Size of the weights of all adapters in a folder."""
    return sum(file.stat().st_size for name in (WEIGHTS_NAME, f"*/{WEIGHTS_NAME}") for file in folder.glob(name))


def told(result: TrainResult) -> str:
    """The losses and the time of a training, in one line."""
    steps = f"{result.steps - result.first_step + 1} steps in {progress.seconds(result.seconds)}"
    return f"Loss      {result.first_loss:.3f} → {result.last_loss:.3f}, {steps}"


def _report(
    as_json: bool, folder: Path, model: PeftModel, result: TrainResult, held_out: tuple[float | None, float | None]
) -> None:
    before, after = held_out
    if as_json:
        trainable, total = model.get_nb_trainable_parameters()
        facts = {"output": str(folder), "adapters": list(model.peft_config), "trainable": trainable, "total": total}
        losses = {"held_out_loss_before": before, "held_out_loss_after": after}
        console.out_json({"ok": True, **facts, **asdict(result), **losses, "bytes": adapter_bytes(folder)})
        return
    console.out(told(result))
    if before is not None and after is not None:
        console.out(f"Held out  {before:.3f} → {after:.3f}")
    console.out(f"Saved     {console.plain(str(folder))}, {size(adapter_bytes(folder))}")


def _interrupted(folder: Path, spec: str) -> str:
    from peftc.integrations.transformers.training import last_checkpoint

    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return f"No checkpoint was written yet; `{folder}` is as it was."
    return f"`{checkpoint}` is whole; `peftc train {spec} --resume` goes on from it."
