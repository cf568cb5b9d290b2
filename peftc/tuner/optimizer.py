"""What an optimiser is that a spec names by `train.optimizer`: its options, which layers it is for, what it keeps.

A method's record lists those that come with it (`TunerMethod.optimizers`); those of torch are in `peftc.registry.optimizers`.
Which layers one is for is seen by their slots, so that it serves every method that has such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftc.config.base import ConfigModel
from peftc.graph.nodes import LINEAR_KINDS, LayerFacts
from peftc.tuner.slots import Slot

if TYPE_CHECKING:
    from torch.optim import Optimizer

#: how names of the slots of two factors end: A reads the input, B writes the output
DOWN, UP = "_A", "_B"


def factors(slots: Iterable[Slot]) -> tuple[Slot, Slot] | None:
    """The two trainable factors A and B among a layer's slots; None where there are not just these two of such names."""
    ends = [slot for slot in slots if slot.name.endswith((DOWN, UP)) and slot.tail in ("", "weight")]
    found = {slot.name[-2:]: slot for slot in ends if slot.trainable}
    if set(found) != {DOWN, UP} or len(ends) != len(found):
        return None
    return found[DOWN], found[UP]


def any_layer(layer: LayerFacts, slots: Sequence[Slot]) -> bool:
    """What torch's optimisers are for."""
    return True


def with_factors(layer: LayerFacts, slots: Sequence[Slot]) -> bool:
    """Layers with two factors that train."""
    return factors(slots) is not None


def with_linear_factors(layer: LayerFacts, slots: Sequence[Slot]) -> bool:
    """Linear layers with two factors that train."""
    return layer.kind in LINEAR_KINDS and factors(slots) is not None


def with_factors_alone(layer: LayerFacts, slots: Sequence[Slot]) -> bool:
    """Layers with two factors that train, and nothing else."""
    return len(slots) == 2 and factors(slots) is not None


def two_means(c: Any, shape: Sequence[int]) -> int:
    """What Adam keeps of a tensor: the means of its gradient and of the gradient's square."""
    return 2 * math.prod(shape)


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimiser's record. Give `make`, or `cls` for a class of parameters alone."""

    #: what a spec calls it, in lower case
    name: str
    #: what people call it
    title: str
    #: the model of `train.optimizer_options`; learning rate and weight decay are not among them: the section has them
    options: type[ConfigModel]
    #: makes it: of the model, the options, the learning rate and the weight decay. What it freezes of the model it freezes here
    make: Callable[[Any, Any, float, float], Optimizer] | None = None
    #: `module:Class` of one that knows no adapters; the options are its keywords
    cls: str = ""
    #: further keywords of the class
    fixed: Mapping[str, Any] = field(default_factory=dict)
    #: what it does, in a sentence
    summary: str = ""
    #: where it was published
    paper: str = ""
    #: other names of it
    aliases: tuple[str, ...] = ()
    #: whether a layer, with the slots that an adapter has there, is one that it is for
    fits: Callable[[LayerFacts, Sequence[Slot]], bool] = any_layer
    #: what such a layer has, for who is told that there is none
    needs: str = ""
    #: whether such layers may be single parameters of experts
    takes_experts: bool = True
    #: whether factors A of such layers do not train
    freezes: bool = False
    #: how many numbers it keeps of a tensor of some shape, with the options
    keeps: Callable[[Any, Sequence[int]], int] = two_means
    #: the package that has to be installed for it, beside those that peftc needs
    package: str = ""
    #: options that the section has, by the name that others have for them
    said: Mapping[str, str] = field(default_factory=dict)
