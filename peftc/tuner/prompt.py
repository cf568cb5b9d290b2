"""What a prompt method declares: storage of virtual tokens, what they are computed from, and where they go.

A method never sees a call. The core's one driver puts the virtual tokens where `place` says and makes masks, labels,
positions and caches as long as they must be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from peftc.config.prompt import PromptLearningConfig
from peftc.tuner.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.tuner.views import PromptContext, PromptView, Tensors

C = TypeVar("C", bound=PromptLearningConfig)


class Place(StrEnum):
    """Where virtual tokens go."""

    INPUT = "input"  # before the embeddings of the input
    INPUTS = "inputs"  # the same, and in an encoder-decoder a second table before the decoder's input
    CACHE = "cache"  # as keys and values that every attention layer finds before those of the input

    @property
    def is_cache(self) -> bool:
        """Whether virtual tokens are keys and values that every attention layer finds before those of the input."""
        return self is Place.CACHE


class PromptTuner(ABC, Generic[C]):
    """A method that adds virtual tokens. Give storage, its start, the table computed from it, and the way back.

    The *table* is `(rows, width)`, rows being `num_virtual_tokens` times `num_transformer_submodules` and width
    `token_dim`. With the place `CACHE` it is `(num_virtual_tokens, num_layers · 2 · token_dim)`: for each layer the keys,
    then the values, head after head.

    A slot is known to the method by its *label*: its name, or `name.tail` where several slots share the name.
    """

    #: where the virtual tokens go
    place: ClassVar[Place] = Place.INPUT
    #: keywords of a call that are for the method alone; the core takes them out and hands them to `labels` and `loss`
    keywords: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def slots(self, c: C, dims: Mapping[str, int]) -> Iterable[Slot]:
        """Storage of the prompt encoder, by model dimensions (`hidden_size`, …). Runs in `peftc plan`, without torch.

        Names in memory are `prompt_encoder.<adapter>.<slot>.<tail>`.
        """

    def encoded(self, c: C, dims: Mapping[str, int]) -> Iterable[Slot]:
        """Storage of an adapter that is loaded, or frozen from the start: less, where only the table is saved."""
        return self.slots(c, dims)

    @abstractmethod
    def init(self, c: C, slots: Mapping[str, Tensor], context: PromptContext) -> None:
        """Fill the slots, by label, from random numbers, the base model's embeddings, or a text."""

    def embeds(self, c: C, a: PromptView) -> Tensor:
        """The table; what is saved as `prompt_embeddings`. Left out, the slot `embedding`."""
        return a["embedding"]

    def restore(self, c: C, saved: Tensors) -> Mapping[str, Tensor]:
        """Slots by label from a checkpoint's tensors: the table as `prompt_embeddings`, and those of `extra`. Left out, the
        table is the slot `embedding`, and others have the names that they are saved under.

        A checkpoint may lack some; their slots stay as `init` made them.
        """
        return {"embedding" if key == "prompt_embeddings" else key: tensor for key, tensor in saved.items()}

    def extra(self, c: C, dims: Mapping[str, int]) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what a checkpoint holds beside the table, by key. Without torch."""
        return {}

    def export(self, c: C, a: PromptView) -> Tensors:
        """The tensors of `extra`, by key."""
        return {}

    def constrain(self, c: C, a: PromptView) -> None:
        """Bring slots back, in place, to where they may be. Called without gradients before the table is computed."""

    # tasks --------------------------------------------------------------------------------------------------------

    def tasks(self, c: C) -> int | None:
        """How many tasks rows of a batch may be of, if each needs its own table: calls then take `task_ids` `(batch,)`."""
        return None

    def of_tasks(self, c: C, a: PromptView, task_ids: Tensor) -> Tensor:
        """One table for each row, `(batch, rows, width)`, for the tasks `(batch,)`."""
        raise NotImplementedError

    # the loss -----------------------------------------------------------------------------------------------------

    def labels(self, c: C, labels: Tensor, keywords: Tensors) -> Tensor | None:
        """Labels `(batch, length)` -> `(batch, num_virtual_tokens + length)`; None leaves virtual tokens without labels."""
        return None

    def loss(self, c: C, logits: Tensor, labels: Tensor, keywords: Tensors) -> Tensor | None:
        """The loss in place of the model's, from logits and widened labels `(batch, num_virtual_tokens + length, …)`."""
        return None
