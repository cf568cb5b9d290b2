"""Training every registered method: it learns, it repeats, it resumes to the same tensors, and it is never half saved."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from peftc import rules
from peftc.checkpoint import save as saving
from peftc.checkpoint.atomic import STAGING
from peftc.config.sections import TrainSection
from peftc.diagnostics import PeftcError
from peftc.integrations.transformers import training
from peftc.integrations.transformers.data import Encoded
from peftc.integrations.transformers.training import Step, fit, last_checkpoint
from peftc.model.mapping import get_peft_model
from peftc.model.peft_model import PeftModel
from peftc.registry.manager import default_registry
from peftc.tuner.method import TunerMethod
from tests.integration import tiny
from tests.unit.chosen import plain_method

#: all that need no other adapters
METHODS = [m for m in map(default_registry().get, default_registry().names) if not m.example_adapters]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.peft_type.lower())
PAD = 1


def rows() -> list[Encoded]:
    """Sequences of several lengths; the last six tokens repeat the same pattern, which can be learnt."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for number in range(14):
        ids = [*torch.randint(2, 90, (3 + number % 4,), generator=generator).tolist(), *[5, 6, 7, 8, 9, PAD]]
        found.append(Encoded(tuple(ids), (-100,) * (len(ids) - 6) + tuple(ids[-6:])))
    return found


def section(**changes: Any) -> TrainSection:
    values = {"data": "unused", "steps": 6, "batch_size": 4, "save_steps": 2, "learning_rate": 1e-2, "device": "cpu"}
    return TrainSection(**{**values, **changes})


def adapted(method: TunerMethod, seed: int = 0) -> PeftModel:
    config = method.config(**{**(method.examples or ({},))[0], "task_type": "CAUSAL_LM"})
    base = tiny.model()
    transformers.set_seed(seed)
    return get_peft_model(base, config)


@torch.no_grad()
def loss_of(model: PeftModel) -> float:
    """The mean loss of all rows."""
    model.eval()
    losses = [model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item() for row in rows()]
    model.train()
    return sum(losses) / len(losses)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def interrupt_at(number: int) -> Callable[[Step], None]:
    def watch(step: Step) -> None:
        if step.number == number:
            raise KeyboardInterrupt

    return watch


@pytest.fixture
def method() -> TunerMethod:
    """Any method will do."""
    return plain_method()


@every_method
def test_training_learns_and_changes_only_the_adapter(method: TunerMethod, tmp_path: Path) -> None:
    model = adapted(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    steps: list[Step] = []
    at_first = loss_of(model)
    fit(model, rows(), PAD, section(steps=25, learning_rate=3e-2), tmp_path / "out", progress=steps.append)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= trainable
    assert loss_of(model) < at_first
    assert [step.number for step in steps] == list(range(1, 26))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "peftc_base.json",
        "peftc_plan.json",
    ]


@every_method
def test_an_interrupted_training_resumes_to_the_very_same_tensors(method: TunerMethod, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fit(adapted(method), rows(), PAD, section(), whole)
    with pytest.raises(KeyboardInterrupt):
        fit(adapted(method), rows(), PAD, section(), halves, progress=interrupt_at(5))
    assert [p.name for p in halves.iterdir()] == ["checkpoint-4"], "one checkpoint, and no adapter that looks finished"
    result = fit(adapted(method, seed=99), rows(), PAD, section(), halves, resume=True)
    assert result.first_step == 5
    assert same(weights(whole), weights(halves))
    assert last_checkpoint(halves) is None


def test_a_seed_repeats_and_another_differs(method: TunerMethod, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fit(adapted(method, seed), rows(), PAD, section(seed=seed), tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_epochs_accumulation_and_activation_checkpointing(method: TunerMethod, tmp_path: Path) -> None:
    how = section(
        steps=None, epochs=2, gradient_accumulation=2, gradient_checkpointing=True, warmup=0.25, scheduler="cosine"
    )
    result = fit(adapted(method), rows(), PAD, how, tmp_path)
    assert result.steps == 4  # 14 rows, 4 a pass, 2 passes a step, twice
    assert result.last_loss < result.first_loss


def test_accumulation_gives_the_gradient_of_the_large_batch(method: TunerMethod, tmp_path: Path) -> None:
    for name, size, parts in (("large", 8, 1), ("parts", 4, 2)):
        how = section(steps=1, batch_size=size, gradient_accumulation=parts, save_steps=None)
        fit(adapted(method), rows(), PAD, how, tmp_path / name)
    large, parts_ = weights(tmp_path / "large"), weights(tmp_path / "parts")
    for key in large:
        torch.testing.assert_close(large[key], parts_[key], rtol=1e-3, atol=1e-5)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves that was interrupted in its fifth step."""
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(adapted(plain_method()), rows(), PAD, section(), folder, progress=interrupt_at(5))
    return folder


@pytest.fixture
def interrupted(left: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(left, tmp_path / "out"))


def refused(call: Callable[[], Any]) -> PeftcError:
    with pytest.raises(PeftcError) as raised:
        call()
    return raised.value


def test_an_unfinished_training_is_not_thrown_away(method: TunerMethod, interrupted: Path) -> None:
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), interrupted))
    assert [d.code for d in error.diagnostics] == [rules.UNFINISHED_TRAINING.code]
    assert "--resume" in str(error)


def test_there_must_be_something_to_resume(method: TunerMethod, tmp_path: Path) -> None:
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), tmp_path / "none", resume=True))
    assert "holds no checkpoint" in str(error)
    assert not (tmp_path / "none").exists()


def test_resuming_with_other_options_and_data_names_each_difference(method: TunerMethod, interrupted: Path) -> None:
    how = section(learning_rate=0.5, batch_size=2, save_steps=3)
    error = refused(lambda: fit(adapted(method), rows()[1:], PAD, how, interrupted, resume=True))
    told = [d.what for d in error.diagnostics]
    assert told == [
        "The training data has changed",
        "`train.batch_size` was 4 and is now 2",
        "`train.learning_rate` was 0.01 and is now 0.5",
    ]
    assert {d.code for d in error.diagnostics} == {rules.CANNOT_RESUME.code}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 8, len(data) // 2):  # some bytes of an archive are padding that means nothing
        data[place] ^= 0xFF
    file.write_bytes(data)


class Payload:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


@pytest.mark.parametrize(
    "content", [Payload(), {"tensors": {}, "steps": {}}, [1]], ids=["a payload", "empty", "a list"]
)
@pytest.mark.parametrize("name", training.ARCHIVES)
def test_a_checkpoint_of_other_content_is_refused(
    name: str, content: object, method: TunerMethod, interrupted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (checkpoint,) = interrupted.glob("checkpoint-*")
    torch.save(content, checkpoint / name)
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), interrupted, resume=True))
    (diagnostic,) = error.diagnostics
    assert diagnostic.code == rules.CANNOT_RESUME.code
    assert name in diagnostic.what
    assert not Path("pwned").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"train": 5}', "[" * 5000, '{"global_step": "x"}'])
@pytest.mark.parametrize("name", [training.RUN_NAME, training.STATE_NAME])
def test_a_checkpoint_with_other_facts_is_refused(name: str, text: str, method: TunerMethod, interrupted: Path) -> None:
    (checkpoint,) = interrupted.glob("checkpoint-*")
    (checkpoint / name).write_text(text, encoding="utf-8")
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), interrupted, resume=True))
    assert {d.code for d in error.diagnostics} == {rules.CANNOT_RESUME.code}


def test_a_disk_that_is_full_for_the_adapters_state_is_told(
    method: TunerMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(content: Any, path: Any, *rest: Any, **more: Any) -> None:
        if Path(path).name == training.ARCHIVES[0]:
            raise RuntimeError("[enforce fail] file write failed")
        save(content, path, *rest, **more)

    monkeypatch.setattr(torch, "save", full)
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), tmp_path / "out"))
    assert str(error.diagnostics[0].what) == "`checkpoint-2` could not be written: [enforce fail] file write failed"
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize("name", training.ARCHIVES)
def test_a_damaged_checkpoint_is_refused(
    method: TunerMethod, interrupted: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(interrupted / "checkpoint-4" / name)
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), interrupted, resume=True))
    assert [d.code for d in error.diagnostics] == [rules.CANNOT_RESUME.code]
    assert name in str(error)


def test_a_loss_that_is_not_finite_stops_the_training(method: TunerMethod, tmp_path: Path) -> None:
    model = adapted(method)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    error = refused(lambda: fit(model, rows(), PAD, section(), tmp_path / "out"))
    assert error.diagnostics[0].code == rules.DIVERGED.code
    assert "at step 1 of 6" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_state.pt", "adapter_model.safetensors"])
def test_a_full_disk_leaves_the_checkpoint_before(
    method: TunerMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pickles, tensors = torch.save, saving.write_tensors
    seen = 0

    def count(file: Any, error: Exception) -> None:
        nonlocal seen
        seen += Path(str(file)).name == name
        if seen == 2:
            raise error

    def save(what: Any, file: Any, **rest: Any) -> None:
        count(file, RuntimeError(f"PytorchStreamWriter failed writing {file}: file write failed"))
        pickles(what, file, **rest)

    def write(file: Path, content: Any, *rest: Any) -> None:
        count(file, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)))
        tensors(file, content, *rest)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(saving, "write_tensors", write)
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), tmp_path))
    assert error.diagnostics[0].code == rules.SAVE_FAILED.code
    assert "checkpoint-4" in str(error)
    assert STAGING not in str(error)  # a name that means nothing to a user
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert fit(adapted(method), rows(), PAD, section(), tmp_path, resume=True).first_step == 3


@pytest.mark.skipif(os.getuid() == 0, reason="a privileged user may write anywhere")
def test_a_folder_without_permission_is_refused_before_training(method: TunerMethod, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), tmp_path / "out"))
    tmp_path.chmod(0o700)
    assert error.diagnostics[0].code == rules.SAVE_FAILED.code


def test_a_file_in_the_way_is_refused_before_training(method: TunerMethod, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    error = refused(lambda: fit(adapted(method), rows(), PAD, section(), tmp_path / "file" / "out"))
    assert error.diagnostics[0].code == rules.SAVE_FAILED.code


def test_other_folders_named_like_checkpoints_are_left_alone(method: TunerMethod, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    fit(adapted(method), rows(), PAD, section(), tmp_path)
    assert (tmp_path / "checkpoint-best").is_dir()
    shutil.rmtree(tmp_path / "checkpoint-best")
