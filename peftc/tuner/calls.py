"""What a method declares that acts around whole calls of the model: other adapters that it weighs, its own storage, and
what it does with a call.

The core loads the other adapters, keeps them beside it, runs the model, and multiplies their updates by what the method
says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic
from peftc.tuner.slots import Slot
from peftc.tuner.views import Config

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.tuner.views import SlotInit

C = TypeVar("C", bound=PeftConfig)

#: runs the model with the updates of the needed adapters multiplied: by a number, or `(batch, tokens, layers, adapters)`
Run = Callable[..., Any]


class CallView(Protocol[Config]):
    """One adapter of a model. Slots are found by label: `a["layers.0.weight"]` is the live tensor."""

    @property
    def config(self) -> Config:
        """The adapter's options."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers that the needed adapters change, in the model's order."""

    @property
    def state(self) -> dict[str, Any]:
        """What the method keeps from call to call, such as a log; it is never saved."""

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""

    def __getitem__(self, label: str) -> Tensor: ...


class CallTuner(ABC, Generic[C]):
    """A method that weighs other adapters, call by call, stateless. Such an adapter has no merged form.

    A slot's label is `name.tail`; its name in memory is `<owner>.<adapter>.<label>`, on disk `<owner>.<label>`.
    """

    #: what the method's own storage is called in the model
    owner: ClassVar[str]
    #: the option that names the adapters to weigh
    option: ClassVar[str] = "adapters"

    @abstractmethod
    def needs(self, c: C) -> Mapping[str, str]:
        """The adapters to weigh: a name for each, and the folder or repository that it is read from."""

    def trains_needed(self, c: C) -> bool:
        """Whether these are trained along."""
        return False

    def resolve(self, c: C, dims: Mapping[str, int]) -> Mapping[str, Any]:
        """Options that the config leaves out, from the model's dimensions; they are saved with the adapter."""
        return {}

    def check(self, c: C, dims: Mapping[str, int]) -> Iterable[Diagnostic]:
        """Problems of the options on a model of these dimensions (`hidden_size`, …)."""
        return ()

    @abstractmethod
    def slots(self, c: C, layers: int) -> Iterable[Slot]:
        """The method's own storage, for so many layers with adapters. Runs in `peftc plan`; must not import torch."""

    @abstractmethod
    def init(self, c: C, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        """Fill freshly made slots (by label) in place; each is uninitialised memory."""

    @abstractmethod
    def around(self, a: CallView[C], run: Run, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What is returned for the model's call. `run(gates, *args, **kwargs)` is the model with the updates of the needed
        adapters multiplied by `gates`: one number, or `(batch, tokens, layers, adapters)` in the order of `a.layers` and of
        `needs`."""
