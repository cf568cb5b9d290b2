"""What the values of an adapter say: tensors that hold nothing, NaN or infinity, factors that were never trained."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING

from peftc import rules
from peftc.checkpoint.format import STORABLE
from peftc.checkpoint.keys import listed
from peftc.diagnostics import Diagnostic
from peftc.graph.tensors import TensorFacts

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.checkpoint.load import AdapterFile


def content_problems(tensors: Mapping[str, Tensor], empty: Container[str] = ()) -> Iterable[Diagnostic]:
    """Before a save: an error for tensors that hold nothing or cannot be stored, a warning for those that hold NaN or infinity.

    `empty` are keys of tensors that are meant to have no element.
    """
    hollow = [key for key, t in tensors.items() if t.is_meta or (t.numel() == 0 and key not in empty)]
    if hollow or not tensors:
        what = f"Nothing is stored in {listed(hollow)}" if hollow else "There is no tensor to save"
        fix = "Gather the parameters first: with ZeRO-3 or FSDP, save from inside the context that gathers full parameters."
        yield rules.SAVE_INCOMPLETE(what, fix=fix)
        return
    strange = [key for key, tensor in tensors.items() if TensorFacts.of(tensor).dtype not in STORABLE]
    if strange:
        what = f"`{TensorFacts.of(tensors[strange[0]]).dtype}` cannot be stored: {listed(strange)}"
        yield rules.SAVE_DTYPE(what, fix=f"Convert them first, to one of {', '.join(STORABLE)}.")
        return
    yield from _not_finite(tensors, tensors.__getitem__)


def stored_problems(file: AdapterFile) -> Iterable[Diagnostic]:
    """Of a saved adapter, reading all of it: warnings for NaN and infinity, and for a kind of tensor that is zero throughout.

    A kind is what a key ends in, such as the second factor of an update, over all layers.
    """
    yield from _not_finite(file.tensors, file.tensor)
    kinds: dict[str, list[str]] = {}
    for key in file.tensors:
        if file.tensor(key).is_floating_point() and key.rpartition(".")[2] != "bias":
            kinds.setdefault(_kind(key), []).append(key)
    for kind, keys in kinds.items():
        if not any(bool(file.tensor(key).any()) for key in keys):
            yield rules.UNTRAINED(
                f"All {len(keys)} tensors `{kind}` are zero: {listed(keys)}",
                fix="Check that the run trained this adapter (its loss fell, gradients reached it) before it was saved.",
            )


def _kind(key: str) -> str:
    owner, _, last = key.rpartition(".")
    return f"{owner.rpartition('.')[2]}.{last}" if last == "weight" and owner else last


def _not_finite(keys: Iterable[str], tensor: Callable[[str], Tensor]) -> Iterable[Diagnostic]:
    keys = list(keys)
    bad = [key for key in keys if not _finite(tensor(key))]
    if bad:
        yield rules.TENSORS_NOT_FINITE(
            f"{len(bad)} of {len(keys)} tensors hold NaN or infinity: {listed(bad)}",
            fix="Go back to an earlier checkpoint; lower the learning rate, clip gradients, or train in bfloat16 or float32.",
        )


def _finite(tensor: Tensor) -> bool:
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return True
    wide = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()  # 8 bits have no `isfinite`
    return bool(wide.isfinite().all())
