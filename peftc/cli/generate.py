"""`peftc generate`: ask a base model, with an adapter or without one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peftc import rules
from peftc.cli import console, progress
from peftc.cli.graph import base_named
from peftc.diagnostics import PeftcError, Where

HELP = "Generate text with a base model and an adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to ask")
    parser.add_argument(
        "--prompts", dest="file", type=Path, metavar="FILE", help="prompts, one a line; or JSON Lines of questions"
    )
    parser.add_argument("--adapter", type=adapter_named, metavar="DIR", help="an adapter's folder")
    parser.add_argument(
        "--base", metavar="MODEL", help="the base model, or a spec that names it; left out, the adapter's"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="longest answer, in tokens (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sample at this temperature (%(default)s: greedy)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (%(default)s)")
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps or xpu (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print prompts and answers as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the answer; with several prompts, each prompt before its answer."""
    prompts = [*args.prompts, *(_prompts_in(args.file) if args.file else ())]
    if not prompts:
        raise PeftcError(rules.NO_PROMPT("No prompt was given", fix='Add one: `peftc generate … "How are you?"`.'))
    if args.adapter is None and args.base is None:
        fix = "Give `--adapter DIR`, `--base MODEL`, or both."
        raise PeftcError(rules.BASE_MISSING("Neither an adapter nor a base model is named", fix=fix))

    from peftc.integrations.transformers import generation, jobs  # here: below the torch line
    from peftc.integrations.transformers.asked import base_of_adapter

    ref = base_named(args.base) if args.base is not None else base_of_adapter(args.adapter)
    device = jobs.device_named(args.device)
    with progress.stage("Loading the base model", quiet=args.quiet):
        base = jobs.load(ref, device)
        model = base.model if args.adapter is None else jobs.with_adapter(base.model, args.adapter)
    how = generation.Decoding(args.max_tokens, args.temperature, args.seed, args.batch_size)
    with progress.stage("Generating", len(prompts), args.quiet or len(prompts) <= args.batch_size) as stage:
        answers = generation.answers(model, base.tokenizer, prompts, how, stage.at)
    if args.json:
        console.out_json([{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
    elif len(prompts) == 1:
        console.out(console.plain(answers[0]))
    else:
        for prompt, answer in zip(prompts, answers, strict=True):
            console.out(
                f"{console.paint('>', 'cyan')} {console.paint(console.plain(prompt), 'bold')}\n{console.plain(answer)}\n"
            )
    return 0


def adapter_named(word: str) -> str:
    """The adapter that a person means by one word. One without a slash is a folder: repositories of the hub have owners."""
    return word if "/" in word else f"./{word}"


def _prompts_in(file: Path) -> list[str]:
    """Lines that are not blank; of a `.jsonl` file the `question` or `prompt` of each. Raises `PeftcError`."""
    try:
        lines = [
            (n, line) for n, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1) if line.strip()
        ]
    except UnicodeDecodeError:
        problem = rules.DATA_UNREADABLE(f"`{file}` is not UTF-8", fix="Save it as UTF-8.", where=Where(file=str(file)))
        raise PeftcError(problem) from None
    except OSError as error:
        what = f"`{file}` cannot be read: {error.strerror}"
        raise PeftcError(rules.DATA_UNREADABLE(what, fix="Check the path.", where=Where(file=str(file)))) from None
    if file.suffix != ".jsonl":
        return [line.strip() for _, line in lines]
    return [_question(line, Where(file=str(file), line=number)) for number, line in lines]


def _question(line: str, where: Where) -> str:
    try:
        data = json.loads(line)
        return str(data["question"] if "question" in data else data["prompt"])
    except (ValueError, TypeError, LookupError, RecursionError):
        fix = 'Write `{"question": "…"}` or `{"prompt": "…"}`.'
        raise PeftcError(rules.DATA_LINE("The line holds no question", fix=fix, where=where)) from None
