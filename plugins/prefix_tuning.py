"""Prefix tuning: trained keys and values that every attention layer sees first (Li and Liang, arXiv:2101.00190, section 4.2).

They are stored as they are, or made by a projection while they are trained (section 4.3); what is saved is the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from peftc.plugin import (
    Field,
    PeftType,
    Place,
    PromptContext,
    PromptLearningConfig,
    PromptTuner,
    PromptView,
    Slot,
    TunerMethod,
    hookimpl,
    module_slot,
)

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.plugin import Tensors


class PrefixTuningConfig(PromptLearningConfig):
    """Options of a prefix-tuning adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("PREFIX_TUNING")
    init_weights: Literal["zero"] | None = None
    """`zero` starts with keys and values of zero; left out, they start at random."""
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Width of the projection; left out, that of the keys."""
    prefix_projection: bool = False
    """Make the keys and values from a smaller table while they are trained."""


class PrefixTuner(PromptTuner[PrefixTuningConfig]):
    """A table with the keys and values of all layers in each row."""

    place = Place.CACHE

    def slots(self, c: PrefixTuningConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        if not c.prefix_projection:
            yield from self.encoded(c, dims)
            return
        width, hidden, all_layers = c.token_dim or 0, c.encoder_hidden_size or 0, _width(c)
        yield module_slot("embedding", (c.num_virtual_tokens or 0, width))
        yield module_slot("transform", (hidden, width), "0.weight")
        yield module_slot("transform", (hidden,), "0.bias")
        yield module_slot("transform", (all_layers, hidden), "2.weight")
        yield module_slot("transform", (all_layers,), "2.bias")

    def encoded(self, c: PrefixTuningConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        yield module_slot("embedding", (c.num_virtual_tokens or 0, _width(c)))

    def init(self, c: PrefixTuningConfig, slots: Mapping[str, Tensor], context: PromptContext) -> None:
        zero = c.init_weights == "zero"
        last = "transform.2" if "transform.2.weight" in slots else "embedding"
        for label, tensor in slots.items():
            if zero and label.startswith(last):
                context.init.zeros(tensor)
            elif label == "embedding":
                context.init.normal(tensor)
            else:
                into = slots[f"{label.rpartition('.')[0]}.weight"].shape[1]
                context.init.uniform(tensor, into**-0.5)

    def embeds(self, c: PrefixTuningConfig, a: PromptView) -> Tensor:
        """The table, or what the projection of section 4.3 makes of it."""
        from torch.nn.functional import linear

        table = a["embedding"]
        if "transform.0.weight" not in a:
            return table
        hidden = linear(table, a["transform.0.weight"], a["transform.0.bias"]).tanh()
        return linear(hidden, a["transform.2.weight"], a["transform.2.bias"])

    def restore(self, c: PrefixTuningConfig, saved: Tensors) -> Mapping[str, Tensor]:
        return {"embedding": saved["prompt_embeddings"]}


def _width(c: PromptLearningConfig) -> int:
    """Keys and values of all layers."""
    return (c.num_layers or 0) * 2 * (c.token_dim or 0)


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "PREFIX_TUNING",
        PrefixTuningConfig,
        PrefixTuner(),
        prefix="prefix_tuning_",
        encoder_class="PrefixEncoder",
        summary="Trained keys and values stand before those of the input, in every layer.",
        paper="arXiv:2101.00190",
        examples=(
            {"num_virtual_tokens": 4},
            {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 6},
        ),
        identity_at_start=lambda c: False,
    )
