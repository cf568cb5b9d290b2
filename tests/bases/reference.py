"""What the reference does on a base, asked live: whether a type of adapter trains there, its losses, what merging costs.

The adapter's first values are saved for us to load, so that losses compare from the same start. Types and their options
are the caller's: `reference.json` has the options with which every type fits the tiny models, and the record of what
the reference came to, written anew by `python -m tests.bases.reference`.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.bases.made import BASES, IDS, Base, loaded

RECORD = Path(__file__).with_suffix(".json")
TARGETS = ["q_proj", "v_proj", "down_proj"]
FLOAT = Base("float", "transformers", lambda folder: loaded())
NOISE = 0.05
RATE = 0.5


@dataclass(frozen=True)
class Told:
    """What the reference came to with one type on one base.

    `adapter` is the folder of its first values; `losses` those of three steps of SGD from there, `apart`
    how far they are from those on the float base (codes taken for weights show here). `merged` is by how
    much merging moved the logits, `unmerged` by how much merging and taking back did, None where it raises; `effect`
    by how much the adapter itself does: a merge that moves them as much has lost the adapter. `refused` is why it does
    not train, or nothing, and then the rest is empty.
    """

    adapter: Path | None = None
    losses: tuple[float, ...] = ()
    apart: float = 0.0
    effect: float = 0.0
    merged: float | None = None
    unmerged: float | None = None
    refused: str = ""


def three_steps(model: nn.Module, **inputs: Any) -> tuple[float, ...]:
    """The losses of three steps of SGD on `IDS`, in training mode and seeded, on whatever of `model` is trainable."""
    model.train()
    torch.manual_seed(3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return tuple(losses)


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    """The logits for `IDS`, in training mode: in evaluation some libraries exchange the weights for others of less precision."""
    model.train()
    torch.manual_seed(3)
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **inputs).logits.float()
    return found


def losses_of_reference(base: Base | str, peft_type: str, **options: Any) -> tuple[float, ...]:
    """The losses of three steps of SGD with the reference's `peft_type` on `base`; see `of_reference`.

    Raises `RuntimeError` with the reference's words where it does not train.
    """
    told = of_reference(base, peft_type, **options)
    if told.refused:
        raise RuntimeError(told.refused)
    return told.losses


def of_reference(base: Base | str, peft_type: str, **options: Any) -> Told:
    """What the reference does with `peft_type` on `base`, once per session; `options` over those of the record."""
    name = base if isinstance(base, str) else base.name
    chosen = {"target_modules": TARGETS, **record()["options"].get(peft_type, {}), **options}
    return asked(name, peft_type, json.dumps(chosen, sort_keys=True))


@functools.cache
def record() -> dict[str, Any]:
    """The file `reference.json`: `options` by type, and `found` by base and type."""
    read: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return read


@functools.cache
def asked(name: str, peft_type: str, chosen: str) -> Told:
    """`of_reference` with options as a text, so that it can be kept."""
    folder = Path(tempfile.mkdtemp(prefix="reference-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base = {**BASES, FLOAT.name: FLOAT}[name]
    options = json.loads(chosen)
    inputs = {"task_ids": torch.tensor([0, 1])} if "n_tasks" in options else {}
    with quiet(), torch.random.fork_rng():
        try:
            model = adapted(base, peft_type, options, folder)
            model.save_pretrained(folder / "adapter")
            losses = three_steps(model, **inputs)
        except Exception as error:  # the reference's own, of whatever kind
            return Told(refused=f"{type(error).__name__}: {error}")
        if not all(map(math.isfinite, losses)):
            return Told(refused=f"its losses are {losses}")
        told = merging(base, peft_type, options, folder, losses, inputs)
    plain = on_float(peft_type, chosen)
    return replace(told, apart=max(abs(ours - float_) for ours, float_ in zip(losses, plain, strict=True)))


@functools.cache
def on_float(peft_type: str, chosen: str) -> tuple[float, ...]:
    """The losses of the reference's `peft_type` on the model in floating point that all bases are made from."""
    options = json.loads(chosen)
    inputs = {"task_ids": torch.tensor([0, 1])} if "n_tasks" in options else {}
    with quiet(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        return three_steps(adapted(FLOAT, peft_type, options, Path(folder)), **inputs)


def adapted(base: Base, peft_type: str, options: Mapping[str, Any], folder: Path) -> Any:
    """The reference's model on a fresh `base`, its trainable values moved by seeded noise."""
    from peft import get_peft_config, get_peft_model

    config = get_peft_config({"peft_type": peft_type, "task_type": "CAUSAL_LM", **options})
    model = base.build(Path(tempfile.mkdtemp(dir=folder)))
    torch.manual_seed(1)  # only now: making a base draws too
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += NOISE * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def merging(
    base: Base, peft_type: str, options: Mapping[str, Any], folder: Path, losses: tuple[float, ...], inputs: Any
) -> Told:
    """`Told` with what merging and unmerging cost, each on a fresh model."""
    costs: dict[str, float | None] = {"merged": None, "unmerged": None}
    model = adapted(base, peft_type, options, folder)
    before = logits(model, **inputs)
    with model.disable_adapter():
        effect = float((logits(model, **inputs) - before).abs().max())
    for kind in costs:
        model = adapted(base, peft_type, options, folder)
        before = logits(model, **inputs)
        try:
            if kind == "merged":
                after = logits(model.merge_and_unload())
            else:
                model.merge_adapter()
                model.unmerge_adapter()
                after = logits(model, **inputs)
        except Exception:  # what it raises differs by type and base: that it does is what counts
            continue
        costs[kind] = float((after - before).abs().max())
    return Told(folder / "adapter", losses, effect=effect, **costs)


@contextmanager
def quiet() -> Iterator[None]:
    """The reference's warnings are its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write() -> None:
    """Ask for every type of the record on every base that can be made here, and put down what came of it."""
    kept = record()
    found = {}
    for base in BASES.values():
        if base.missing():
            continue
        found[base.name] = {
            kind: row for kind in kept["options"] if (row := brief(of_reference(base, kind))) is not None
        }
        print(base.name, len(found[base.name]), "of", len(kept["options"]), file=sys.stderr)
    RECORD.write_text(json.dumps({"options": kept["options"], "found": found}, indent=1) + "\n", encoding="utf-8")


def brief(told: Told) -> dict[str, float | None] | None:
    """A row of the record, or nothing where the type does not train."""
    if told.refused:
        return None
    sizes = {"apart": told.apart, "effect": told.effect, "merged": told.merged, "unmerged": told.unmerged}
    return {key: value if value is None else float(f"{value:.1e}") for key, value in sizes.items()}


if __name__ == "__main__":
    write()
