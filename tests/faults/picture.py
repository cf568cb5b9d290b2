"""Everything that can be seen of a model and its adapters, as a list to be compared: nothing of it may change by what fails.

Objects of torch, of sessions and wrappers are looked into; of all others it is written down which object they are.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftc.config.base import PeftConfig
from peftc.runtime.call import Shared
from peftc.runtime.session.base_tensors import BaseTensors
from peftc.runtime.session.session import Session
from peftc.runtime.session.step_state import StepState
from peftc.runtime.slots.stores import Stores

#: Classes whose objects are looked into.
_OPEN = (nn.Module, Session, Shared, Stores, BaseTensors, StepState)
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device)

#: Where something is, and what it is.
Picture = list[tuple[str, object]]


def picture(*roots: object) -> Picture:
    """Objects in their order, values, bits, flags."""
    found: Picture = [
        ("gradients", torch.is_grad_enabled()),
        ("collector", gc.isenabled()),
        ("device", torch.get_default_device()),
    ]
    seen: set[int] = set()
    for root in roots:
        _look(root, "", found, seen)
    return found


@dataclass(frozen=True)
class Address:
    """Where an object is."""

    number: int


def elsewhere(seen: Picture) -> list[object]:
    """The picture of an equal model of other objects: which are the same is told by their order."""
    order: dict[Address, int] = {}

    def plain(value: object) -> object:
        if isinstance(value, Address):
            return order.setdefault(value, len(order))
        return tuple(map(plain, value)) if isinstance(value, tuple) else value

    return [(name, plain(value)) for name, value in seen]


def differences(before: Picture, after: Picture) -> list[str]:
    """What is not the same, with what leads to it."""
    places = [index for index, (one, other) in enumerate(zip(before, after, strict=False)) if one != other]
    if not places and len(before) != len(after):
        places = [min(len(before), len(after))]
    return [
        f"{'.'.join(name for name, _ in before[max(0, index - 3) : index])} {before[index : index + 1]} -> {after[index : index + 1]}"
        for index in places[:3]
    ]


def _look(thing: Any, name: str, found: Picture, seen: set[int]) -> None:
    if isinstance(thing, _PLAIN):
        found.append((name, thing))
        return
    found.append((name, type(thing).__name__ if isinstance(thing, (tuple, set, frozenset)) else Address(id(thing))))
    if isinstance(thing, (set, frozenset)):
        found.append((name, sorted(map(str, thing))))
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        found.append((name, _facts(thing)))
    elif isinstance(thing, PeftConfig):
        found.append((name, repr(thing)))
    else:
        for key, value in _inside(thing):
            _look(value, str(key), found, seen)


def _facts(tensor: Tensor) -> tuple[object, ...]:
    """A tensor's bits, the memory they are in, and its flags."""
    flags = (tensor.dtype, tuple(tensor.shape), tensor.requires_grad, tensor.grad is None)
    if tensor.is_meta or not tensor.numel():
        return flags
    data = tensor.detach()
    return (*flags, Address(data.data_ptr()), hash(data.contiguous().view(-1).view(torch.uint8).numpy().tobytes()))


def _inside(thing: Any) -> Iterator[tuple[object, object]]:
    if isinstance(thing, Mapping):
        yield from thing.items()
    elif isinstance(thing, (list, tuple)):
        yield from enumerate(thing)
    elif isinstance(thing, _OPEN):
        yield from thing.__dict__.items()
