"""Work on folders that is killed at random moments, in forked children of one process; run as a script by the tests of kills.

Everything carries a generation: the values of all tensors, and an option of the config. A folder is whole if all that is
in it is of one. Data reaches the disk as it does for users. Prints what was found as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from peftc import PeftModel, convert_adapter
from peftc.checkpoint.atomic import STAGING
from peftc.checkpoint.load import load_adapter_tensors
from peftc.checkpoint.names import WEIGHTS_NAME
from peftc.checkpoint.pickled import pickle_to_safetensors
from peftc.checkpoint.save import save_adapter
from peftc.config.base import CONFIG_NAME
from peftc.config.sections import TrainSection
from peftc.graph.base_ref import BaseRef
from peftc.integrations.transformers import patchable, streaming
from peftc.integrations.transformers.data import Encoded
from peftc.integrations.transformers.jobs import merge
from peftc.integrations.transformers.training import fit
from peftc.model.mapping import get_peft_model
from tests.runtime.methods import LANGUAGE_MODEL, METHODS, adapted, narrow
from tests.unit.fakes import registered

#: Children that were killed, by how.
Found = dict[str, Any]


def killed(act: Callable[[], object], seconds: float) -> bool:
    """Run in a child and kill it after this time; whether it was still at work."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")
        act()
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def timed(act: Callable[[], object]) -> float:
    """How long it takes a child when it is let alone."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
    return time.monotonic() - start


def generation(folder: Path) -> str:
    """That of an adapter's folder, `"absent"`, or what is wrong with it."""
    if not (folder / CONFIG_NAME).exists():
        return "absent" if not (folder / WEIGHTS_NAME).exists() else "no config"
    factor = json.loads((folder / CONFIG_NAME).read_text())["factor"]
    values = {float(value) for tensor in load_adapter_tensors(folder).values() for value in tensor.unique()}
    return str(factor) if values == {factor} else f"config {factor}, weights {sorted(values)}"


def of_generation(model: PeftModel, number: int) -> PeftModel:
    """Give all adapters the values of a generation."""
    with torch.no_grad():
        for name, config in model.peft_config.items():
            config.factor = float(number)  # type: ignore[attr-defined]  # the option of this method
            for tensor in model.session.tensors(name).values():
                tensor.fill_(number)
    return model


def staging(place: Path) -> int:
    """How many saves that did not end have left something, in the folder where most have."""
    return max(Counter(stage.parent for stage in place.rglob(f"{STAGING}*")).values(), default=0)


def saves(place: Path, chance: random.Random, times: int, *names: str) -> Found:
    """Adapters are saved again and again into one folder."""
    folder, found = place / "adapter", Found(kills=0, wrong=[], left=0, seen=[])
    model = adapted(narrow(), **{name: narrow() for name in names})
    of_generation(model, 0).save_pretrained(folder)
    folders = [folder, *(folder / name for name in names)]
    longest = timed(lambda: of_generation(model, 0).save_pretrained(folder))
    for number in range(1, times + 1):

        def act(number: int = number) -> None:
            for more in range(3):
                of_generation(model, 3 * number + more).save_pretrained(folder)

        found["kills"] += killed(act, chance.uniform(0, 2.5 * longest))
        states = {generation(each) for each in folders}
        found["seen"] += states
        if len(states) > 1 or not states.pop().replace(".", "").isdecimal():
            found["wrong"].append(f"{number}: {[generation(each) for each in folders]}")
        found["left"] = max(found["left"], staging(place))
    model.save_pretrained(folder)
    return {**found, "seen": len(set(found["seen"])), "rest": staging(place)}


def merges(place: Path, chance: random.Random, times: int) -> Found:
    """A model is merged and saved into a new folder."""
    found = Found(kills=0, wrong=[], left=0)
    config = narrow(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LANGUAGE_MODEL.build(), config)
    longest = timed(lambda: merge(model, None, place / "first"))
    keys = _keys(place / "first")
    for number in range(times):
        folder = place / str(number)
        found["kills"] += killed(lambda folder=folder: merge(model, None, folder), chance.uniform(0, longest))
        if folder.exists() and _keys(folder) != keys:
            found["wrong"].append(f"{number}: {sorted(path.name for path in folder.iterdir())}")
        found["left"] = max(found["left"], staging(place))
    merge(model, None, place / "last")
    return {**found, "rest": staging(place)}


def patches(place: Path, chance: random.Random, times: int) -> Found:
    """A base's files are patched into a new folder."""
    found = Found(kills=0, wrong=[], left=0)
    config = narrow(target_modules="all-linear", task_type="CAUSAL_LM")
    base: Any = LANGUAGE_MODEL.build()
    base.save_pretrained(place / "base", max_shard_size="8KB")
    get_peft_model(base, config).save_pretrained(place / "adapter")
    ref = BaseRef(path=str(place / "base"))

    def act(folder: Path) -> None:
        streaming.merge(patchable.job_for(place / "adapter", ref), folder, lambda done: None, any_base=True)

    longest = timed(lambda: act(place / "first"))
    whole = _files(place / "first")
    for number in range(times):
        folder = place / str(number)
        found["kills"] += killed(lambda folder=folder: act(folder), chance.uniform(0, longest))
        if folder.exists() and _files(folder) != whole:
            found["wrong"].append(f"{number}: {sorted(path.name for path in folder.iterdir())}")
        found["left"] = max(found["left"], staging(place))
    act(place / "last")
    return {**found, "rest": staging(place)}


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _keys(folder: Path) -> set[str]:
    if not (folder / "config.json").exists():
        return set()
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {f"{key} {file.get_tensor(key).shape}" for key in file.keys()}  # noqa: SIM118  # it is no dictionary


def conversions(place: Path, chance: random.Random, times: int) -> Found:
    """An adapter is converted, to another method or out of a pickle, into a new folder."""
    found, pickled = Found(kills=0, wrong=[], left=0), place / "pickled"
    model = adapted(narrow())
    of_generation(model, 1).save_pretrained(pickled)
    torch.save(load_adapter_tensors(pickled), pickled / "adapter_model.bin")
    (pickled / WEIGHTS_NAME).unlink()

    def to_method(folder: Path) -> None:
        made = convert_adapter(model, "NARROW", 2)
        save_adapter(folder, made.tensors, made.config)

    for number in range(times):
        folder = place / str(number)
        act = to_method if number % 2 else lambda folder: pickle_to_safetensors(pickled, folder)
        if number < 2:
            longest = timed(lambda act=act: act(place / "first"))
            shutil.rmtree(place / "first")
        found["kills"] += killed(lambda act=act, folder=folder: act(folder), chance.uniform(0, 1.2 * longest))
        if folder.exists() and not {CONFIG_NAME, WEIGHTS_NAME} <= set(os.listdir(folder)):
            found["wrong"].append(f"{number}: {os.listdir(folder)}")
        elif folder.exists():
            load_adapter_tensors(folder)
        found["left"] = max(found["left"], staging(place))
    to_method(place / "last")
    return {**found, "rest": staging(place)}


def trainings(place: Path, chance: random.Random, times: int) -> Found:
    """A training is killed again and again, each time goes on from its last checkpoint, and ends as if it never was."""
    found = Found(kills=0, wrong=[], left=0)
    rows = [Encoded((1, 2, 3 + n % 5, 4), (1, 2, 3 + n % 5, 4)) for n in range(12)]
    how = TrainSection(data="data", steps=6, batch_size=2, learning_rate=0.01, save_steps=1, device="cpu")

    def train(folder: Path) -> None:
        torch.manual_seed(0)
        model = get_peft_model(LANGUAGE_MODEL.build(), narrow(target_modules="all-linear", task_type="CAUSAL_LM"))
        fit(model, rows, 0, how, folder, resume=any(folder.glob("checkpoint-*")))

    def quietly(folder: Path) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train(folder)

    longest = timed(lambda: quietly(place / "alone"))
    alone = load_adapter_tensors(place / "alone")
    number = 0
    while found["kills"] < times and number < 4 * times:
        folder = place / f"{number}"
        while found["kills"] < times and killed(lambda folder=folder: quietly(folder), chance.uniform(0, longest)):
            found["kills"] += 1
            for adapter in [*folder.glob("checkpoint-*"), folder]:
                if (adapter / CONFIG_NAME).exists():
                    load_adapter_tensors(adapter)
            found["left"] = max(found["left"], staging(place))
        if not (folder / CONFIG_NAME).exists():
            timed(lambda folder=folder: quietly(folder))
        ended = load_adapter_tensors(folder)
        if any(not torch.equal(ended[key], tensor) for key, tensor in alone.items()):
            found["wrong"].append(f"{number}: other values")
        number += 1
    return {**found, "rest": staging(place)}


TASKS: dict[str, Callable[..., Found]] = {
    "save": saves,
    "several": lambda place, chance, times: saves(place, chance, times, "other", "third"),
    "merge": merges,
    "patch": patches,
    "convert": conversions,
    "train": trainings,
}


def main() -> None:
    """`killing.py TASK TIMES SEED`"""
    task, times, seed = sys.argv[1:]
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="peftc-killing-"))
    try:
        with registered(*METHODS):
            found = TASKS[task](place, random.Random(int(seed)), int(times))
        print(f"\n{json.dumps(found)}")
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
