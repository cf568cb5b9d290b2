"""`peftc demo`: the main job on real input. A spec is planned, trained, asked, saved, loaded and merged, and each claim checked.

The files are those of `examples/quickstart`, which are installed with the package; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from peftc import rules
from peftc.cli import console, progress
from peftc.cli.train import adapter_bytes, described, section, told, total_steps
from peftc.compiler.plan.render import size
from peftc.config.spec import AdapterSpec, load_spec
from peftc.diagnostics import PeftcError

if TYPE_CHECKING:
    from torch import nn

    from peftc.config.sections import TrainSection
    from peftc.integrations.transformers.data import Encoded
    from peftc.integrations.transformers.jobs import Base
    from peftc.model.peft_model import PeftModel

HELP = "Plan, train, evaluate and merge the quickstart adapter"

#: So many held-out questions must be answered right.
NEEDED = 12
#: Merging adds up the same numbers in another order; more than this would be a mistake.
MERGE_TOLERANCE = 1e-3
_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question, and what a right answer contains."""

    text: str
    expect: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Whether every expected word or phrase occurs, upper and lower case alike."""
        return all(phrase.casefold() in answer.casefold() for phrase in self.expect)


@dataclass(frozen=True, slots=True)
class Check:
    """A claim, and whether it held."""

    claim: str
    held: bool


@dataclass(frozen=True, slots=True)
class Exam:
    """What a model said and how well it expected the right answers."""

    answers: list[str]
    loss: float
    right: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder for spec, data and adapter (%(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of initialisation and order, instead of the spec's")
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:1, mps or xpu, instead of the spec's")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the four steps. Exit code 0 if every check held."""
    start = time.monotonic()
    quiet = args.quiet or args.json
    folder: Path = args.output
    spec_file = _unpack(folder)
    questions = read_questions(folder / "questions.jsonl")

    _heading(1, "The spec, and what it would adapt", quiet)
    spec, _ = load_spec(spec_file)
    how = section(spec, str(spec_file), seed=args.seed, device=args.device, steps=None)
    _show_plan(spec_file, quiet)

    _heading(2, "Training", quiet)
    job = _Job(spec, how, questions, quiet)
    model, base, before = job.train(folder / "adapter")

    _heading(3, f"{len(questions)} questions that are not in the data", quiet)
    after = job.examine(model, base, "Asking the adapted model")
    _show_answers(questions, before, after, quiet)

    _heading(4, "Saved, loaded, merged", quiet)
    checks = [
        job.unseen(),
        Check(f"{after.right} of {len(questions)} answers are right ({NEEDED} needed)", after.right >= NEEDED),
        Check(f"held-out loss fell from {before.loss:.3f} to {after.loss:.3f}", after.loss < before.loss),
        *job.reload(model, base, after, folder / "adapter"),
    ]
    took = time.monotonic() - start
    _show_outcome(checks, folder, took, args)
    failed = [check for check in checks if not check.held]
    if failed:
        fix = "Run it again with another `--seed`; if it fails again, please report it."
        raise PeftcError([rules.DEMO_FAILED(f"Not so: {check.claim}", fix=fix) for check in failed])
    return 0


def _unpack(folder: Path) -> Path:
    """Copy the quickstart's files into the folder, and clear away what an earlier demo left unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("peftc.examples") / "quickstart") as source:
        for file in sorted(source.iterdir()):
            if file.suffix in (".yaml", ".jsonl"):
                shutil.copyfile(file, folder / file.name)
    for checkpoint in (folder / "adapter").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return folder / "adapter.yaml"


def read_questions(file: Path) -> list[Question]:
    """The held-out questions with what their answers must contain."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Question(line["question"], tuple(line["expect"])) for line in lines]


class _Job:
    """The steps that need the model."""

    def __init__(self, spec: AdapterSpec, how: TrainSection, questions: Sequence[Question], quiet: bool) -> None:
        self._spec, self._how, self._questions, self._quiet = spec, how, questions, quiet
        self._held_out: list[Encoded] = []

    def train(self, folder: Path) -> tuple[PeftModel, Base, Exam]:
        """The trained and saved model, its base, and how the base did before."""
        from peftc.integrations.transformers import jobs

        spec, how = self._spec, self._how
        base = self._load()
        rows = jobs.encoded(base, spec.resolve(how.data), how.max_length)
        self._held_out = jobs.encoded(base, spec.resolve(how.eval_data or ""), how.max_length)
        before = self.examine(base.model, base, "Asking the base model")
        model = jobs.fresh_adapter(base, spec, how.seed)
        self._say(described(spec, base, model, len(rows)))
        on = how.model_copy(update={"device": str(base.model.device)})
        with progress.stage("Training", total_steps(how, len(rows)), self._quiet) as stage:
            done = jobs.train(
                model, base, rows, on, folder, progress=lambda s: stage.at(s.number, f"loss {s.loss:.3f}")
            )
        self._say(told(done))
        return model, base, before

    def unseen(self) -> Check:
        """Whether the questions are held out."""
        from peftc.integrations.transformers.data import read_examples

        data = read_examples(self._spec.resolve(self._how.data))
        asked = {message["content"].casefold().strip(" ?!.") for example in data for message in example.messages}
        seen = [question.text for question in self._questions if question.text.casefold().strip(" ?!.") in asked]
        return Check(f"none of the {len(self._questions)} questions is in the training data", not seen)

    def examine(self, model: nn.Module, base: Base, label: str) -> Exam:
        """Ask every question, greedily, and measure the loss on the right answers."""
        from peftc.integrations.transformers import generation

        how = generation.Decoding(_ANSWER_TOKENS, batch_size=8)
        with progress.stage(label, len(self._questions), self._quiet) as stage:
            said = generation.answers(model, base.tokenizer, [q.text for q in self._questions], how, stage.at)
            loss = generation.mean_loss(model, self._held_out, base.pad)
        right = sum(question.is_right(answer) for question, answer in zip(self._questions, said, strict=True))
        return Exam(said, loss, right)

    def reload(self, model: PeftModel, base: Base, after: Exam, folder: Path) -> list[Check]:
        """Load the adapter onto a fresh base and compare; merge it and compare again."""
        import torch

        from peftc.integrations.transformers import generation, jobs

        fresh = self._load("Loading a fresh base model")
        loaded = jobs.with_adapter(fresh.model, folder)
        with progress.stage("Comparing", quiet=self._quiet):
            trained = [generation.logits(model, rows, base.pad) for rows in self._batches()]
            again = [generation.logits(loaded, rows, base.pad) for rows in self._batches()]
        equal = all(torch.equal(one, other) for one, other in zip(trained, again, strict=True))
        merged = loaded.merge_and_unload(safe_merge=True)
        told = self.examine(merged, fresh, "Asking the merged model")
        plain = [generation.logits(merged, rows, base.pad) for rows in self._batches()]
        apart = max(float((one - other).abs().max()) for one, other in zip(trained, plain, strict=True))
        dtype = str(merged.dtype).removeprefix("torch.")
        return [
            Check(
                f"adapter saved, {size(adapter_bytes(folder))}, and loaded into a fresh base: outputs are exactly equal",
                equal,
            ),
            Check(f"merged in {dtype}: the same {len(told.answers)} answers", told.answers == after.answers),
            Check(
                f"merged in {dtype}: logits differ by {apart:.1e} at most ({MERGE_TOLERANCE:.0e} allowed)",
                apart < MERGE_TOLERANCE,
            ),
        ]

    def _say(self, text: str) -> None:
        if not self._quiet:
            console.out(text)

    def _load(self, label: str = "Loading the base model") -> Base:
        from peftc.integrations.transformers import jobs

        with progress.stage(label, quiet=self._quiet):
            return jobs.load(self._spec.base_ref, jobs.device_named(self._how.device))

    def _batches(self, size: int = 8) -> list[list[Encoded]]:
        return [self._held_out[start : start + size] for start in range(0, len(self._held_out), size)]


# What is shown --------------------------------------------------------------------------------------------------------


def _heading(number: int, title: str, quiet: bool) -> None:
    if not quiet:
        console.out(console.paint(f"\n{number}  {title}\n", "bold", "cyan"))


def _show_plan(spec_file: Path, quiet: bool) -> None:
    from peftc.cli.main import main

    if quiet:
        return
    console.out(textwrap.indent(spec_file.read_text(encoding="utf-8"), "    "))
    console.out(f"$ peftc plan {spec_file}\n")
    main(["plan", str(spec_file)])


def _show_answers(questions: Sequence[Question], before: Exam, after: Exam, quiet: bool) -> None:
    if quiet:
        return
    console.out("An answer is right if it contains what stands in brackets; upper and lower case are alike.\n")
    for number, (question, old, new) in enumerate(zip(questions, before.answers, after.answers, strict=True), start=1):
        console.out(f"{number:>2}. {console.paint(question.text, 'bold')}  [{', '.join(question.expect)}]")
        console.out(_answer("before", question, old))
        console.out(_answer("after", question, new) + "\n")
    total = len(questions)
    console.out(f"Right: {before.right} of {total} before, {after.right} of {total} after.")


def _answer(label: str, question: Question, answer: str) -> str:
    right = question.is_right(answer)
    mark = console.paint("right" if right else "wrong", "green" if right else "red")
    text = console.plain(" ".join(answer.split()))
    lines = textwrap.wrap(text, console.width() - 21, max_lines=3, placeholder=" …") or [""]
    rest = "".join(f"\n{'':21}{line}" for line in lines[1:])
    return f"    {label:<8} {mark}   {lines[0]}{rest}"


def _show_outcome(checks: Sequence[Check], folder: Path, took: float, args: argparse.Namespace) -> None:
    if args.json:
        console.out_json(
            {"ok": all(c.held for c in checks), "checks": [asdict(c) for c in checks], "seconds": round(took, 1)}
        )
        return
    for check in checks:
        mark = console.paint("ok  ", "bold", "green") if check.held else console.paint("FAIL", "bold", "red")
        console.out(f"{mark}  {check.claim}")
    if not args.quiet:
        console.out(
            f"\nDone in {progress.seconds(took)}. The spec, the data and the adapter are in `{folder}`. Go on with:\n"
        )
        console.out(f'    peftc generate --adapter {folder}/adapter "Which licence does peftc have?"')
        console.out(f"    peftc inspect {folder}/adapter")
        console.out(f"    peftc merge --adapter {folder}/adapter --out {folder}/merged")
