"""Which base weights an adapter was trained on: a small print of them that is saved with it, and compared when it is loaded.

Structure and shapes are the plan's business. The print samples a few matrices: their first bytes, hashed, which tell any change
at the same dtype, and some of their numbers, which tell another model when the base is loaded in another one. Names are those
of the model's own layers, whatever replicas it has while it is adapted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.names import BASE_NAME, QUANTIZATION
from peftc.config.reader import read_text
from peftc.diagnostics import Diagnostic, Severity, Where
from peftc.graph.replication import Replication
from peftc.host.quantised import quantization_said
from peftc.limits import MAX_CARD
from peftc.runtime.session.session import Session

#: matrices in a print, spread evenly over the model, and how much of each is looked at
MATRICES, HASHED_BYTES, NUMBERS = 8, 2**16, 6


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of one matrix: `numbers` lie at even distances over all of it."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    numbers: tuple[float, ...]


def print_of(session: Session) -> str | None:
    """The print of a model's base as it is without adapters, as text, with how it is quantised; None where no weight can be read
    here, as all are sharded, or elsewhere."""
    samples: dict[str, Any] = {name: asdict(_sample(tensor)) for name, tensor in _chosen(session)}
    said = quantization_said(session.model)
    samples |= {QUANTIZATION: said} if said else {}
    return json.dumps(samples, separators=(",", ":")) if samples else None


#: gives a weight of a base by its name there, None if it has no numbers to compare
Weights = Callable[[str], Tensor | None]


def differing(session: Session, text: str) -> tuple[list[str], int]:
    """Names of base weights that are not those of a print, and of how many that could be compared. A print that cannot be
    read compares with nothing: it is a remark in a file, which anyone may have written."""
    return _differing(partial(_readable, session), text)


def _differing(weights: Weights, text: str) -> tuple[list[str], int]:
    others, compared = [], 0
    for name, sample in _read(text):
        tensor = weights(name)
        if tensor is not None and tuple(tensor.shape) == sample.shape:
            compared += 1
            others += [] if _same(sample, tensor) else [name]
    return others, compared


def told(session: Session, folder: Path, name: str | None, severity: Severity | None = None) -> tuple[Diagnostic, ...]:
    """A warning, or what `severity` says, if the model has other weights than the base that an adapter was saved on.

    `folder` is the adapter's, `name` is what it calls its base. Without a print there nothing is said.
    """
    return told_of(partial(_readable, session), folder, name, severity)


def told_of(
    weights: Weights, folder: Path, name: str | None, severity: Severity | None = None
) -> tuple[Diagnostic, ...]:
    """The same of a base that is no model: `weights` reads them."""
    file = folder / BASE_NAME
    if not file.is_file():
        return ()
    others, compared = _differing(weights, read_text(str(file), MAX_CARD))
    if not others:
        return ()
    what = f"The adapter was trained on other base weights: {len(others)} of {compared} samples differ, such as `{others[0]}`"
    fix = "Load it onto the weights that it was trained on" + (f", those of `{name}`." if name else ".")
    return (rules.OTHER_BASE(what, fix=fix, where=Where(file=str(file)), severity=severity),)


def _replication(session: Session) -> Replication | None:
    """How the model's layers are replicated now, if they are; before an adapter is on it, they are not yet."""
    return None if session.stack is None else session.graph.replication


def _chosen(session: Session) -> Iterator[tuple[str, Tensor]]:
    replication = _replication(session)
    found = [
        f"{node.path}.{name}"
        for node in session.graph.nodes
        if node.path not in (session.graph.model.input_embeddings, session.graph.model.output_embeddings)
        for name, facts in node.facts.params.items()
        if len(facts.shape) > 1
    ]  # embeddings are left out, as they are resized
    names = found if replication is None else list(dict.fromkeys(map(replication.origin, found)))
    count = min(MATRICES, len(names))
    for name in (names[at * (len(names) - 1) // max(count - 1, 1)] for at in range(count)):
        tensor = _readable(session, name)
        if tensor is not None:
            yield name, tensor


def _readable(session: Session, name: str) -> Tensor | None:
    """A base parameter as it was before anything was merged into it, None if it has no numbers here."""
    replication = _replication(session)
    path, _, own = (name if replication is None else replication.replica(name) or "").rpartition(".")
    module, layer = session.find(path), session.layers.get(path)
    kept: Tensor | None = None
    if layer is not None:
        kept = layer.memory_of(own)
    tensor = kept if kept is not None or module is None else module._parameters.get(own)
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return None
    return (
        tensor.detach() if tensor.is_floating_point() and tensor.numel() > 1 and tensor.dim() > 1 else None
    )  # or a shard


def _sample(tensor: Tensor) -> Sample:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().view(-1)
    head = flat[: HASHED_BYTES // flat.element_size()].cpu()
    digest = hashlib.sha256(head.view(torch.uint8).numpy().data).hexdigest()[:32]
    at = torch.linspace(0, flat.numel() - 1, NUMBERS, dtype=torch.float64).long().unique()
    numbers = tuple(flat[at.to(flat.device)].to("cpu", torch.float32).tolist())
    return Sample(str(flat.dtype).removeprefix("torch."), tuple(tensor.shape), digest, numbers)


def _same(told: Sample, tensor: Tensor) -> bool:
    now = _sample(tensor)
    if now.dtype == told.dtype:
        return (now.sha256, now.numbers) == (told.sha256, told.numbers)
    coarse = max(_step(told.dtype), _step(now.dtype))
    pairs = zip(told.numbers, now.numbers, strict=False)
    return all(abs(a - b) <= 2 * coarse * max(abs(a), abs(b)) + 1e-7 for a, b in pairs)


def _step(dtype: str) -> float:
    kind = getattr(torch, dtype, None)
    return torch.finfo(kind).eps if isinstance(kind, torch.dtype) and kind.is_floating_point else 1.0


def _read(text: str) -> Iterable[tuple[str, Sample]]:
    try:
        data: Mapping[str, Mapping[str, Any]] = json.loads(text)
        return [
            (
                name,
                Sample(
                    str(of["dtype"]),
                    tuple(map(int, of["shape"])),
                    str(of["sha256"]),
                    tuple(map(float, of["numbers"])),
                ),
            )
            for name, of in data.items()
            if name != QUANTIZATION
        ]
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ()
