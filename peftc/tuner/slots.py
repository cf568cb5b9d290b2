"""What storage a method needs on a layer, declared without torch, and the names it gets in memory and on disk.

A `Slot` is one tensor per adapter and site. A `Key` is its name as a record; text is made from it only at the edges and
nothing searches or replaces in text, so an adapter may be called `weight` or `lora_A`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum


class Container(StrEnum):
    """How a slot is held."""

    MODULE = "module"  # in a small module of its own: `lora_A.default.weight`
    PARAMETER = "parameter"  # as a bare parameter: `ia3_l.default`


class Share(StrEnum):
    """Which layers of an adapter have one tensor together, where a slot's `share` is none of the method's own keys."""

    #: all that have the slot; the tensor also shows at the model's own level and is saved under that, `base_model.<slot>`
    MODEL = "model"
    #: those whose base weights are one tensor, such as tied embeddings; a checkpoint has a copy under the key of each layer
    WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Slot:
    """One named tensor of an adapter at one site.

    The functions `parameter_slot`, `module_slot`, `derived_slot` and `constant_slot` make the usual ones;
    `dataclasses.replace(slot, saved=False)` changes what they have no argument for.
    """

    #: begins with the record's prefix, if it is saved and not derived
    name: str
    #: sizes, none of them 0
    shape: tuple[int, ...]
    #: how it is held
    container: Container = Container.PARAMETER
    #: name of the tensor inside a module container
    tail: str = ""
    #: whether it is trained
    trainable: bool = True
    #: whether a checkpoint has it; what it has not, the method makes again when it is loaded
    saved: bool = True
    #: as torch names it (`"int64"`); left out, the base layer's, with half precision lifted to float32
    dtype: str | None = None
    #: whether its name in memory has the adapter's in it; without, which is for modules only, just the active adapter's
    #: tensor can be in the model
    named: bool = True
    #: what a constant holds: the core fills it, saved or not, and the method's `init` need not
    value: float | None = None
    #: whether it is a frozen buffer that the method computes again wherever it was not saved (`MapTuner.derive`)
    derived: bool = False
    #: layers whose slots of one name have the same of these, a `Share` or any other key, have one tensor
    share: str = ""
    #: filled in by the compiler: the path of the layer that a shared tensor is saved under, empty for the model itself
    home: str | None = None
    #: what stands for the tail in a checkpoint's key, where that is something else
    stored_tail: str | None = None
    #: of how many equal parts the first dimension consists, such as a rank for each group of a convolution; to be made
    #: larger, each of them is
    blocks: int = 1

    @property
    def label(self) -> tuple[str, str, str | None]:
        """What tells a tensor from others of an adapter, if the slot is shared."""
        return self.name, self.tail, self.home

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def dotted(self) -> str:
        """Name and tail."""
        return f"{self.name}.{self.tail}" if self.tail else self.name


def module_slot(
    name: str, shape: tuple[int, ...], tail: str = "weight", trainable: bool = True, share: str = ""
) -> Slot:
    """A slot inside a small module of its own, as a low-rank factor: `P.name.<adapter>.weight`. Layers whose slots of this
    name have the same `share`, a `Share` or any key of the method's own, have one tensor."""
    return Slot(name, shape, Container.MODULE, tail, trainable, share=share)


def parameter_slot(
    name: str, shape: tuple[int, ...], trainable: bool = True, named: bool = True, share: str = ""
) -> Slot:
    """A bare parameter, as a vector of scales: `P.name.<adapter>`; `P.name` if not `named`. `share` as of `module_slot`."""
    return Slot(name, shape, Container.PARAMETER, "", trainable, named=named, share=share)


def derived_slot(
    name: str, shape: tuple[int, ...], saved: bool = False, share: str = "", dtype: str | None = None
) -> Slot:
    """A frozen buffer that the method derives, such as seeded projections or positions: `P.name.<adapter>`."""
    return Slot(name, shape, trainable=False, saved=saved, dtype=dtype, derived=True, share=share)


def linear_slots(name: str, into: int, out: int, tail: str = "") -> Iterator[Slot]:
    """Weight `(out, into)` and bias `(out,)` of a linear layer of the method's own, in one container; `tail` tells it from others
    there.

    >>> [slot.dotted for slot in linear_slots("layers", 8, 4, "0")]
    ['layers.0.weight', 'layers.0.bias']
    """
    place = f"{tail}." if tail else ""
    yield module_slot(name, (out, into), f"{place}weight")
    yield module_slot(name, (out,), f"{place}bias")


def labelled(slots: Iterable[Slot]) -> dict[str, Slot]:
    """Slots by label: the name, or `name.tail` where several slots share the name.

    >>> list(labelled([module_slot("table", (2, 3)), module_slot("head", (3, 3)), module_slot("head", (3,), "bias")]))
    ['table', 'head.weight', 'head.bias']
    """
    slots = list(slots)
    alone = {slot.name: slot for slot in slots}
    if len(alone) == len(slots):  # as nearly always, and asked for every layer
        return alone
    shared = Counter(slot.name for slot in slots)
    return {slot.name if shared[slot.name] == 1 else f"{slot.name}.{slot.tail}": slot for slot in slots}


def constant_slot(name: str, shape: tuple[int, ...], value: float) -> Slot:
    """A bare parameter that is neither trained nor saved: the options say what is in it."""
    return Slot(name, shape, trainable=False, saved=False, value=value)


@dataclass(frozen=True, slots=True)
class Key:
    """The name of a stored tensor: `owner.slot.adapter.tail` in memory, `owner.slot.tail` on disk.

    `owner` is the module path inside the base model; `root` what stands before it (`base_model.model.` for a wrapped
    model, nothing for an injected one). `adapter` and `tail` may be empty: then the name does without. On disk a shared
    tensor is under its `home` instead, another module's path, or empty for the level of the model.
    """

    owner: str
    slot: str
    adapter: str
    tail: str = ""
    home: str | None = None
    stored_tail: str | None = None

    def memory(self, root: str = "") -> str:
        """Name among the live model's parameters."""
        return root + ".".join(part for part in (self.owner, self.slot, self.adapter, self.tail) if part)

    def disk(self, root: str = "base_model.model.") -> str:
        """Name in the checkpoint."""
        owner = self.owner if self.home is None else self.home
        root = root.removesuffix("model.") if self.home == "" else root
        tail = self.tail if self.stored_tail is None else self.stored_tail
        return root + ".".join(part for part in (owner, self.slot, tail) if part)
