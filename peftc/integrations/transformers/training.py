"""Training an adapted model with transformers' `Trainer`: repeatable, resumable, and never half saved.

`Trainer` knows only its own models, so saving and loading go through the adapter here; everything else is its own. A
checkpoint is written beside its final place and renamed, so an interrupted training resumes from the last whole one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from peftc import rules
from peftc.checkpoint.atomic import replace_files
from peftc.config.json_text import parse_json
from peftc.config.reader import read_text
from peftc.config.sections import TrainSection
from peftc.diagnostics import Diagnostic, PeftcError, Where
from peftc.host.trainer import RECOMPUTE, adapted_model, takes_loss_keywords, use_one_device
from peftc.installed.requirements import require
from peftc.integrations.transformers.architecture import FAILURES, told
from peftc.integrations.transformers.data import Collator, Encoded
from peftc.integrations.transformers.optimizing import optimizing
from peftc.integrations.transformers.steps import AdapterSteps
from peftc.limits import MAX_JSON
from peftc.model.parts import identity
from peftc.model.parts.files import live_names
from peftc.model.peft_model import PeftModel
from peftc.registry.boundary import is_out_of_memory
from peftc.registry.optimizers import chosen_optimizer
from peftc.runtime.session.steps import restore_step_states, step_states

#: What a checkpoint was made with, beside Trainer's own files; a resumed training must have the same.
RUN_NAME = "peftc_training.json"
STATE_NAME = "trainer_state.json"
#: What carries on a training, the adapter as it lives in the model first: an adapter's own file may hold less, as the
#: tables that an encoder gives. The others are Trainer's; all are archives with checksums.
ARCHIVES = ("adapter_state.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth")

#: What only a hash tells of.
_CONTENTS = {"data.content": "The training data has changed", "base.weights": "The base model has other weights"}


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its number from 1, of how many, the mean loss per token, and seconds since the start."""

    number: int
    of: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training did. `first_step` is over 1 where it was resumed; the losses are of its first and last step."""

    steps: int
    first_step: int
    first_loss: float
    last_loss: float
    seconds: float


#: Where a checkpoint is written before it takes its place, which means nothing to a user.
_STAGED = re.compile(r"`?\S*/\.peftc-save-\S*: ?")


class _Rows(Dataset[Encoded]):
    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Encoded:
        return self._rows[index]


def fit(
    model: PeftModel,
    rows: Sequence[Encoded],
    pad: int,
    how: TrainSection,
    folder: Path,
    *,
    resume: bool = False,
    progress: Callable[[Step], None] | None = None,
    samples: Mapping[str, int] | None = None,
) -> TrainResult:
    """Train the active adapters of a `PeftModel` in place and save it to `folder`.

    `samples` are how many examples the starts of adapters have read. With `resume`, go on from the last checkpoint in `folder`;
    the result is the same as without the interruption. Raises `PeftcError` if there is none or it does not fit, if `folder`
    holds checkpoints and `resume` is off, and if the loss stops being finite. An interrupt passes through; adapter and
    checkpoints on the disk are whole at any moment.
    """
    require("train")
    run = _run_facts(model, rows, how) | {"starts": dict(samples or {})}
    checkpoint = last_checkpoint(folder)
    if resume:
        _check_resumable(checkpoint, folder, run)
    elif checkpoint is not None:
        raise PeftcError(
            rules.UNFINISHED_TRAINING(
                f"`{folder}` holds `{checkpoint.name}` of a training that did not end",
                fix=f"Go on with `--resume`, choose another `--output`, or remove `{folder}`.",
                where=Where(file=str(folder)),
            )
        )
    _require_writable(folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = chosen_optimizer(how.optimizer, how.optimizer_options)
    watcher = _Watcher(progress)
    trainer = AdapterTrainer(
        model,
        folder,
        run,
        args=_arguments(how, folder),
        train_dataset=_Rows(rows),
        data_collator=Collator(pad),
        callbacks=[watcher, AdapterSteps()],
        **optimizing(own, model, how),
    )
    trainer.remove_callback(PrinterCallback)  # prints each log record to stdout, where results go
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    except BaseException:  # also an interrupt: Trainer made the folder, and an empty one says nothing
        with suppress(OSError):
            folder.rmdir()
        raise
    finally:
        for parameter in trained:  # some optimisers freeze factors, for their own training alone
            parameter.requires_grad_(True)
    model.save_pretrained(str(folder))
    remove_checkpoints(folder)
    return watcher.result()


class AdapterTrainer(Trainer):
    """`Trainer` with adapter folders as checkpoints. `run` is stored in each, to be compared when it is resumed."""

    def __init__(self, adapted: PeftModel, folder: Path, run: Mapping[str, Any], **keywords: Any) -> None:
        self._adapted = adapted
        self._folder = folder
        self._run = run
        self._stage: Path | None = None
        with adapted_model(adapted):
            super().__init__(model=adapted, **keywords)
        self.model_accepts_loss_kwargs = takes_loss_keywords(adapted.get_base_model())  # not what the wrapper passes on

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage is not None else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._adapted.save_pretrained(output_dir or self._folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = self._folder / f"checkpoint-{self.state.global_step}"

        def write(stage: Path) -> None:
            self._stage = stage
            try:
                super(AdapterTrainer, self)._save_checkpoint(model, trial)
                made = stage / target.name
                for item in sorted(made.iterdir()):
                    item.rename(stage / item.name)
                made.rmdir()
                own = {name: tensor.detach() for name, tensor in _own(self._adapted).items()}
                torch.save({"tensors": own, "steps": step_states(self._adapted.session)}, stage / ARCHIVES[0])
                (stage / RUN_NAME).write_text(json.dumps(self._run, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            except PeftcError as error:  # of saving the adapter, which knows only where it is staged
                raise PeftcError(_not_written(target, error.diagnostics[0].what)) from error
            except (OSError, RuntimeError) as error:  # the latter is how torch says that a disk is full
                if is_out_of_memory(error):
                    raise
                raise PeftcError(_not_written(target, error)) from error

        try:
            replace_files(target, write, commit=STATE_NAME)
        except PeftcError:  # may be an `OSError` itself
            raise
        except OSError as error:
            raise PeftcError(_not_written(target, error)) from error
        finally:
            self._stage = None
        remove_checkpoints(self._folder, but=target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _from_checkpoint(resume_from_checkpoint, ARCHIVES[0]):
            archive = Path(resume_from_checkpoint) / ARCHIVES[0]
            stored = torch.load(archive, map_location="cpu", weights_only=True, mmap=False)
            with torch.no_grad():
                for name, tensor in _own(self._adapted).items():
                    tensor.copy_(stored["tensors"][name])
            restore_step_states(self._adapted.session, stored["steps"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _from_checkpoint(checkpoint, "optimizer.pt` or `scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _from_checkpoint(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)


@contextmanager
def _from_checkpoint(folder: str | None, name: str) -> Iterator[None]:
    """What is not a checkpoint's content is told by its file: a pickle of something else, tensors of another training."""
    try:
        yield
    except PeftcError:
        raise
    except (*FAILURES, pickle.PickleError) as error:
        if is_out_of_memory(error):
            raise
        what = f"`{name}` of the checkpoint is not what a training wrote: {told(error)}"
        fix = f"Remove `{folder}` and train anew without `--resume`."
        raise PeftcError(rules.CANNOT_RESUME(what, fix=fix, where=Where(file=folder))) from error


def _own(model: PeftModel) -> dict[str, Tensor]:
    """The tensors of all adapters by their names in the model, those that are not saved with them included."""
    live = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    plans = model.session.plans.values()
    names = {name for plan in plans for name in (*live_names(plan).values(), *(p.name for p in plan.parameters()))}
    return {name: tensor for name, tensor in live.items() if name in names}


class _Watcher(TrainerCallback):
    """Passes each step on, and stops a training whose loss is not finite."""

    def __init__(self, progress: Callable[[Step], None] | None) -> None:
        self._progress = progress
        self._start = time.monotonic()
        self._losses: dict[int, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **rest: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise PeftcError(
                rules.DIVERGED(
                    f"The loss is {loss} at step {state.global_step} of {state.max_steps}",
                    fix="Lower `train.learning_rate`, add `train.warmup_steps`, or use a wider `base.dtype`.",
                )
            )
        self._losses[state.global_step] = loss
        if self._progress is not None:
            self._progress(Step(state.global_step, state.max_steps, loss, time.monotonic() - self._start))

    def result(self) -> TrainResult:
        first, last = min(self._losses), max(self._losses)
        return TrainResult(last, first, self._losses[first], self._losses[last], time.monotonic() - self._start)


def _require_writable(folder: Path) -> None:
    """Find out now, not after hours of training."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        possible = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except PermissionError:  # not even a parent may be entered
        possible = False
    if not possible:
        what = f"`{folder}` is not in a folder that you may write to"
        raise PeftcError(rules.SAVE_FAILED(what, fix="Choose another `--output`.", where=Where(file=str(folder))))


def _arguments(how: TrainSection, folder: Path) -> TrainingArguments:
    recompute: dict[str, Any] = {RECOMPUTE: True} if how.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=how.steps or -1,
        num_train_epochs=how.epochs or 1,
        per_device_train_batch_size=how.batch_size,
        gradient_accumulation_steps=how.gradient_accumulation,
        learning_rate=how.learning_rate,
        lr_scheduler_type="constant_with_warmup" if how.scheduler == "constant" else how.scheduler,
        warmup_steps=how.warmup,
        weight_decay=how.weight_decay,
        max_grad_norm=how.max_grad_norm,
        save_strategy="no" if how.save_steps is None else "steps",
        save_steps=how.save_steps or 1,
        seed=how.seed,
        use_cpu=how.device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss of NaN is to be seen, not skipped
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        remove_unused_columns=False,  # the collator gives exactly what the model takes
        label_names=["labels"],
        dataloader_pin_memory=False,
        **recompute,
    )
    use_one_device(arguments)
    return arguments


# Checkpoints ----------------------------------------------------------------------------------------------------------


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a folder, or None."""
    return max(_checkpoints(folder), key=_steps_of, default=None)


def remove_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Remove all checkpoints in a folder, one excepted."""
    for path in _checkpoints(folder):
        if path != but:
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal() and path.is_dir()]


def _steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-", 1)[1])


def _not_written(target: Path, error: OSError | RuntimeError | str) -> Diagnostic:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
    what = f"`{target.name}` could not be written: {_STAGED.sub('', reason)}"
    return rules.SAVE_FAILED(what, fix="Free some space, or choose another `--output`.", where=Where(file=str(target)))


def adapter_folder(folder: Path, name: str) -> Path:
    """Where an adapter lies below the folder that several are saved to."""
    return folder if name == "default" else folder / name


def _run_facts(model: PeftModel, rows: Sequence[Encoded], how: TrainSection) -> dict[str, Any]:
    """All that must be equal for a training to be carried on: options by subject, JSON data."""
    content = hashlib.sha256()
    for row in rows:
        content.update(repr((row.input_ids, row.labels)).encode())
    options = how.model_dump(mode="json", exclude={"data", "eval_data", "save_steps", "device", "start_samples"})
    options |= chosen_optimizer(how.optimizer, how.optimizer_options).said
    adapters = {}
    for name, config in model.peft_config.items():
        kept = {key: value for key, value in config.to_json().items() if key not in ("peft_version", "inference_mode")}
        adapters[f"adapters.{name}"] = kept
    base = hashlib.sha256((identity.print_of(model.session) or "").encode()).hexdigest()
    return {"train": options, "data": {"content": content.hexdigest()}, "base": {"weights": base}, **adapters}


def _check_resumable(checkpoint: Path | None, folder: Path, run: Mapping[str, Any]) -> None:
    """Raise `PeftcError` if there is no checkpoint, it is damaged, or it was made with other options or data."""
    if checkpoint is None:
        what = f"`{folder}` holds no checkpoint to go on from"
        fix = "Leave out `--resume`; `train.save_steps` says how often a checkpoint is written."
        raise PeftcError(rules.CANNOT_RESUME(what, fix=fix, where=Where(file=str(folder)), why=""))
    problems = [problem for name in (RUN_NAME, STATE_NAME, *ARCHIVES) if (problem := _damage(checkpoint / name))]
    if not problems:
        stored = _read_facts(checkpoint / RUN_NAME)
        problems = [
            rules.CANNOT_RESUME(
                _CONTENTS.get(key) or f"`{key}` was {old} and is now {new}",
                fix="Set it back, or start anew in another `--output`.",
                where=Where(file=str(checkpoint)),
            )
            for key, old, new in _differences(stored, run)
        ]
    if problems:
        raise PeftcError(problems)


def _differences(stored: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for subject in sorted({*stored, *run}):
        old, new = stored.get(subject, {}), run.get(subject, {})
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                found.append((f"{subject}.{key}", json.dumps(old.get(key)), json.dumps(new.get(key))))
    return found


def _read_facts(path: Path) -> Mapping[str, Any]:
    """What a training wrote of itself. Raises `PeftcError`, `TypeError` and `ValueError` for anything else."""
    data = parse_json(read_text(str(path), MAX_JSON), str(path)).data
    if not isinstance(data, dict):
        raise ValueError("it is not an object")
    if path.name == STATE_NAME:
        steps = TrainerState(**data).global_step
        if type(steps) is not int or steps < 0:
            raise ValueError(f"`global_step` is {steps!r:.40}")
    elif not all(isinstance(facts, dict) for facts in data.values()):
        raise ValueError("it is not facts by subject")
    return data


def _damage(path: Path) -> Diagnostic | None:
    """What is wrong with a file of a checkpoint, if anything."""
    fix = f"Remove `{path.parent}` and train anew without `--resume`."
    try:
        if path.suffix == ".json":
            _read_facts(path)
            return None
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        reason = f"`{bad}` in it has a wrong checksum" if bad else None
    except PeftcError as error:
        reason = error.diagnostics[0].what
    except OSError as error:
        reason = error.strerror or str(error)
    except (TypeError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error)
    if reason is None:
        return None
    return rules.CANNOT_RESUME(
        f"`{path.name}` of the checkpoint cannot be read: {reason}", fix=fix, where=Where(file=str(path))
    )
