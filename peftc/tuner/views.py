"""What a method's mathematics is handed: protocols that the runtime implements, so that this side needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeVar

    from peftc.config.base import PeftConfig
    from peftc.graph.nodes import LayerFacts

    #: the config's class; left out, as in `a: View`, any
    Config = TypeVar("Config", bound=PeftConfig, default=Any, covariant=True)
else:
    from typing import TypeVar

    Config = TypeVar("Config", covariant=True)


class NoSlot(AttributeError, KeyError):
    """A method asks its view for a slot that it has not declared: its own mistake, wherever it is noticed."""

    def __str__(self) -> str:
        return str(self.args[0])


def no_slot(label: str, there: Iterable[str]) -> NoSlot:
    """The error for a label that is none of those."""
    return NoSlot(f"no slot `{label}`; there are {sorted(there)}")


class View(Protocol[Config]):
    """One adapter's slots on one layer. Slots are attributes: `a.lora_A` is the live tensor, looked up at each use. Of
    `View[C]` the options are of the class `C`.

    Where several slots share a name they are found by label: `a["layers.weight"]`.
    """

    @property
    def config(self) -> Config:
        """The options in force on this layer, patterns applied."""

    @property
    def layer(self) -> LayerFacts:
        """Facts of the base layer."""

    @property
    def scaling(self) -> float:
        """The current factor."""

    @property
    def training(self) -> bool:
        """Whether to drop what the method drops in training: the layer's mode in a forward, never where adapters are
        folded into the weight or combined. Draw from torch; what is repeated for backward draws the same again."""

    @property
    def base(self) -> Mapping[str, Tensor]:
        """The base layer's own parameters, frozen, in logical order, as they were before anything was merged into them.

        For a `branch` that needs them. They are read for this; what a branch can do without is not read.
        """

    def __getitem__(self, label: str) -> Tensor:
        """The live tensor of a slot by label."""

    def down(self, A: Tensor, x: Tensor) -> Tensor:
        """`A x` with the layer's own geometry, for a `branch` that is thin in a way of its own: A `(r, in · kernel)` on the
        channels of all groups or, where it has no more, on those of each; a table for ids."""

    def up(self, B: Tensor, h: Tensor) -> Tensor:
        """`B h` of what `down` gave: B `(out, r)`, or `(out, r / groups)` for a part of it in each group."""

    def of_rows(self, name: str, x: Tensor, default: int | None = None) -> Tensor:
        """What the call gives for each row of `x`, by one of the method's `keywords`: `(rows,)`, on the device of `x`.

        Raises `PeftcError` if the call gives none and there is no default, or another number of them.
        """

    @property
    def noted(self) -> dict[str, Any]:
        """What the method notes in a call in training, for its `loss` afterwards; copies and files have none of it."""

    @property
    def siblings(self) -> Mapping[str, View]:
        """Views of the other adapters of the method on the layer, active or not, by name, as they are now: they come and go.

        For a `branch` that weighs what others would add, each by its own options and scaling. Never written to. Raises `PeftcError`
        if one of them has a base weight of its own (`Start.changes_base`), which cannot be there for it alone.
        """

    def kept(
        self,
        name: str,
        make: Callable[[], Tensor],
        slots: Sequence[str] = (),
        base: Sequence[str] = (),
        of: Sequence[str] = (),
    ) -> Tensor:
        """What `make` computes, without gradients, of these slots, of these of the base's parameters, and of the scaling where
        there are slots. It is computed once, and again when one of them is another tensor or was changed in place; in
        training at every call, if one of them trains, and wherever a call is traced.

        Where siblings are named in `of`, slots and scaling are theirs and not its own; it is computed again for others.
        """

    def __getattr__(self, slot: str) -> Tensor: ...


class SlotInit(Protocol):
    """Initialisers, so that a method needs no import for the usual ones. Meta tensors are left alone.

    Random numbers are those of torch's global generator on the CPU, in its default dtype, whatever the tensor's: one seed
    gives one start, on every device. `skip_…` draws as many as the tensor has numbers and keeps none, so that those that
    follow are the reference's; what is in the tensor is lost.
    """

    def zeros(self, tensor: Tensor) -> None:
        """All 0."""

    def ones(self, tensor: Tensor) -> None:
        """All 1."""

    def fill(self, tensor: Tensor, value: float) -> None:
        """All of one value."""

    def normal(self, tensor: Tensor, std: float = 1.0, mean: float = 0.0) -> None:
        """Normal, with this deviation around this mean."""

    def skip_normal(self, tensor: Tensor) -> None:
        """As many numbers drawn as `normal` would draw, and none kept."""

    def skip_uniform(self, tensor: Tensor) -> None:
        """As many numbers drawn as `uniform` would draw, and none kept."""

    def uniform(self, tensor: Tensor, bound: float) -> None:
        """Uniform between `-bound` and `bound`."""

    def kaiming_uniform(self, tensor: Tensor, a: float = 5**0.5) -> None:
        """As `torch.nn.init.kaiming_uniform_` does (He et al. 2015, equation 14); left out, `a` is that of the weights of torch's
        own linear layers."""

    @property
    def base(self) -> Mapping[str, Tensor]:
        """The base layer's own parameters by name, in logical order, without what is merged into them. Not to be written
        to. Read at each use, so that adapters that start otherwise never touch them; nothing around whole modules."""

    def of_expert(self, name: str, index: int) -> SlotInit:
        """The same for one expert of the stack called `name`: in `base` it has its own `weight`."""


class PromptView(Protocol):
    """One adapter's prompt encoder. Slots are found by label, also as attributes where the label is a name."""

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""

    def __contains__(self, label: str) -> bool: ...

    def __getitem__(self, label: str) -> Tensor: ...

    def __getattr__(self, label: str) -> Tensor: ...


class PromptContext(Protocol):
    """What a prompt may start from."""

    @property
    def init(self) -> SlotInit:
        """Initialisers."""

    @property
    def embedding_weight(self) -> Tensor:
        """The base model's input embeddings, `(vocabulary, hidden_size)`."""

    def tokenize(self, name_or_path: str, text: str, **kwargs: Any) -> Sequence[int]:
        """Token ids of a text, `kwargs` going to the tokenizer. Raises `PeftcError` if there is no such tokenizer here."""


#: Tensors by name.
Tensors = Mapping[str, "Tensor"]
#: For each name those of several adapters, one after the other.
TensorLists = Mapping[str, Sequence["Tensor"]]
