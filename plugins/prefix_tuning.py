"""Prefix tuning: trained keys and values stand before those of the input, in every layer (Li and Liang,
arXiv:2101.00190, section 4.2).

They are stored as they are, or made by a projection while they are trained (section 4.3); what is saved is the result.
"""

from __future__ import annotations

from typing import Literal

from peftc import plugin as p


class PrefixTuningConfig(p.PromptLearningConfig):
    """Options of a prefix-tuning adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("PREFIX_TUNING")
    init_weights: Literal["zero"] | None = None
    """`zero` starts with keys and values of zero; left out, they start at random."""
    encoder_hidden_size: int | None = p.Field(default=None, ge=1)
    """Width of the projection; left out, that of the keys."""
    prefix_projection: bool = False
    """Make the keys and values from a smaller table while they are trained."""


class PrefixTuner(p.PromptTuner[PrefixTuningConfig]):
    """A table with the keys and values of all layers in each row."""

    place = p.Place.CACHE

    def slots(self, c: PrefixTuningConfig, dims: p.Dims) -> p.Slots:
        if not c.prefix_projection:
            yield from self.encoded(c, dims)
            return
        hidden = c.encoder_hidden_size or 0
        yield p.module_slot("embedding", (c.num_virtual_tokens or 0, c.width))
        yield from p.linear_slots("transform", c.width, hidden, "0")
        yield from p.linear_slots("transform", hidden, c.cache_width, "2")

    def encoded(self, c: PrefixTuningConfig, dims: p.Dims) -> p.Slots:
        yield p.module_slot("embedding", (c.num_virtual_tokens or 0, c.cache_width))

    def init(self, c: PrefixTuningConfig, slots: p.Tensors, context: p.PromptContext) -> None:
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

    def embeds(self, c: PrefixTuningConfig, a: p.PromptView) -> p.Tensor:
        """The table, or what the projection of section 4.3 makes of it."""
        table = a["embedding"]
        if "transform.0.weight" not in a:
            return table
        return p.linear(a, "transform.2", p.linear(a, "transform.0", table).tanh())


peftc_tuner = p.method(
    PrefixTuningConfig,
    PrefixTuner(),
    prefix="prefix_tuning_",
    encoder_class="PrefixEncoder",
    examples=(
        {"num_virtual_tokens": 4},
        {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 6},
    ),
)
