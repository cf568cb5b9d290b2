"""What a storage is: how a library keeps the weight of a linear layer in a form of its own, packed into fewer bits.

A storage belongs to no method, and no method knows of any. It says which layers are stored so, opens their weight, and packs another
in its place; the core does the rest: planning, training beside the layer, merging and taking out again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.graph.nodes import Packed

if TYPE_CHECKING:
    from torch import Tensor, nn


class Storage(ABC):
    """One way to store the weight of linear layers. Stateless; one object serves all layers.

    The docstring's first line says what it is, for lists.
    """

    #: what it is asked for by, in lower case
    name: ClassVar[str]
    #: what the status of a model calls it (`quantization_backend`), where the reference has another word; left out, its name
    known_as: ClassVar[str] = ""
    #: the package that brings these layers, as it is installed
    package: ClassVar[str] = ""
    #: classes of layers that are stored so, each as `module.Class`; subclasses are as well
    classes: ClassVar[tuple[str, ...]] = ()
    #: classes of the tensor that is a linear layer's `weight`, likewise
    tensors: ClassVar[tuple[str, ...]] = ()
    #: names of the parameters, buffers and attributes of the layer that hold its weight
    held: ClassVar[tuple[str, ...]] = ("weight",)
    #: whether a call of the layer gives a tensor that nobody else keeps, so that an update may be added to it in place
    fresh: ClassVar[bool] = True
    #: functions, each as `module.qualified_name`, that the library has called before a model's own forward to open its weights for
    #: good; they are taken off the model once adapters are on it, and the layers have to compute as they are (`settings`)
    openers: ClassVar[tuple[str, ...]] = ()
    #: why no other weight can be stored in this form; empty if it can
    unwritable: ClassVar[str] = ""

    def holds(self, layer: nn.Module) -> bool:
        """Whether a layer of these classes is stored so just now; False for one that is not packed yet."""
        return True

    def cannot_pack(self, layer: nn.Module) -> str:
        """Why this layer can be given no other weight; empty if it can."""
        return self.unwritable

    def settings(self, layer: nn.Module) -> Mapping[str, Any]:
        """Attributes, and parameters, that a layer needs to have once adapters are on its model, by name: where the library would
        else change its weight in calls, for example, or has."""
        return {}

    def example(self, layer: nn.Linear) -> nn.Module:
        """A layer in this storage with the weight and bias of a plain one in float32, whose sizes are multiples of 64: what the
        conformance kit builds its models of (`peftc plugins check NAME`, and `--storage NAME` of methods)."""
        raise NotImplementedError(f"{type(self).__name__} gives no `example`")

    @abstractmethod
    def facts(self, layer: nn.Module) -> Packed:
        """Sizes, dtype and bytes of the weight, and whether gradients pass its layer. No numbers are looked at: the layer may be on the meta device."""

    @abstractmethod
    def open(self, layer: nn.Module) -> Tensor:
        """The weight in floating point, `(out, in)`, where the layer computes; a tensor of its own or not to be written to."""

    def pack(self, layer: nn.Module, weight: Tensor) -> Mapping[str, Any]:
        """What stands under the names in `held` for a weight `(out, in)`, packed with the layer's own settings: parameters, buffers
        and attributes. The layer stays as it is. Not asked of one that `cannot_pack`."""
        raise NotImplementedError(f"{type(self).__name__} is not `unwritable`, and gives no `pack`")
