"""What a method declares that acts around whole modules: which, with what storage, and what is computed in their place.

The core makes the wrapper, puts it into the model and takes it out again; the method never sees how that is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from peftc.config.base import PeftConfig
from peftc.graph.nodes import ModuleGraph, ModuleNode
from peftc.tuner.slots import Slot
from peftc.tuner.views import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftc.tuner.views import SlotInit

C = TypeVar("C", bound=PeftConfig)


class ModuleView(Protocol[Config]):
    """One adapter around one module. Slots are attributes: `a.shift` is the live tensor, looked up at each use.

    Where several slots share a name they are found by label: `a["down.weight"]`.
    """

    @property
    def config(self) -> Config:
        """The adapter's options."""

    @property
    def module(self) -> nn.Module:
        """The wrapped module, to be called, or parts of it, or neither."""

    def __getitem__(self, label: str) -> Tensor:
        """The live tensor of a slot by label."""

    def __getattr__(self, slot: str) -> Tensor: ...


class ModuleTuner(ABC, Generic[C]):
    """A method that stands in for whole modules, stateless. Such an adapter has no merged form, and at most one of those
    that wrap the same module acts at a time.

    Slots may be `named=False`: then only the active adapter's tensors are in the model, under names without the
    adapter's, those of the others are kept aside, and where none is active the model has its own module.
    """

    #: what the wrapped module is called inside the wrapper: its parameters are `<path>.<inner>.…`
    inner: ClassVar[str] = "base_layer"

    def resolve(self, c: C, graph: ModuleGraph) -> Mapping[str, Any]:
        """Options that the config leaves out, from the model; they are saved with the adapter."""
        return {}

    @abstractmethod
    def sites(self, c: C, graph: ModuleGraph) -> Mapping[str, str]:
        """Paths of the modules to wrap, each with what in the options means it. Runs in `peftc plan`, without torch.

        Raises `PeftcError` with everything that keeps the adapter from being put on the model; a diagnostic whose place
        is the name of an option is shown where the option stands.
        """

    @abstractmethod
    def slots(self, c: C, node: ModuleNode, graph: ModuleGraph) -> Iterable[Slot]:
        """The storage needed around one module. Runs in `peftc plan`; must not import torch."""

    @abstractmethod
    def init(self, c: C, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        """Fill freshly made slots (by label) in place; each is uninitialised memory."""

    @abstractmethod
    def forward(self, a: ModuleView[C], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the model gets for its call `module(*args, **kwargs)`; `a.module` is the wrapped module."""
