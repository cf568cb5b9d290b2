"""P-tuning: virtual tokens before the input, made by a small network while they are trained (Liu et al., arXiv:2103.10385).

The network of section 3.2 only helps training: what is saved is its output, and a loaded adapter is that table alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from itertools import pairwise

from peftc import plugin as p


class PromptEncoderReparameterizationType(StrEnum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


class PromptEncoderConfig(p.PromptLearningConfig):
    """Options of a P-tuning adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("P_TUNING")
    encoder_reparameterization_type: PromptEncoderReparameterizationType = p.Field(
        default=PromptEncoderReparameterizationType.MLP, strict=False
    )
    """The network: a perceptron (`MLP`), or a bidirectional recurrent one and a perceptron (`LSTM`)."""
    encoder_hidden_size: int | None = p.Field(default=None, ge=1)
    """Width of the network; left out, that of the virtual tokens."""
    encoder_num_layers: p.Count = 2
    """Layers of the recurrent network."""
    encoder_dropout: float = p.Field(default=0.0, ge=0.0, le=1.0)
    """Probability of dropping what goes between layers of the recurrent network, in training."""


class PTuningTuner(p.PromptTuner[PromptEncoderConfig]):
    """A table, and the network that turns it into virtual tokens."""

    def slots(self, c: PromptEncoderConfig, dims: p.Dims) -> p.Slots:
        yield from self.encoded(c, dims)
        hidden = c.encoder_hidden_size or 0
        widths = [c.width, hidden, hidden, c.width]
        if c.encoder_reparameterization_type == "LSTM":
            widths = [2 * hidden, 2 * hidden, c.width]
            for tail, shape in _lstm_shapes(c):
                yield p.module_slot("lstm_head", shape, tail)
        for layer, (into, out) in enumerate(pairwise(widths)):
            yield from p.linear_slots("mlp_head", into, out, str(2 * layer))

    def encoded(self, c: PromptEncoderConfig, dims: p.Dims) -> p.Slots:
        yield p.module_slot("embedding", (c.rows, c.width))

    def init(self, c: PromptEncoderConfig, slots: p.Tensors, context: p.PromptContext) -> None:
        """As torch starts such layers."""
        for label, tensor in slots.items():
            if label == "embedding":
                context.init.normal(tensor)
            elif label.startswith("lstm_head"):
                context.init.uniform(tensor, (c.encoder_hidden_size or 1) ** -0.5)
            else:
                into = slots[label.removesuffix(".bias") + ".weight"] if label.endswith(".bias") else tensor
                context.init.uniform(tensor, into.shape[1] ** -0.5)

    def embeds(self, c: PromptEncoderConfig, a: p.PromptView) -> p.Tensor:
        """What the network makes of the table; a loaded adapter has the table alone."""
        x = a["embedding"]
        if "lstm_head.weight_ih_l0" in a:
            x = _recurrent(c, a, x)
        for layer in ("mlp_head.0", "mlp_head.2", "mlp_head.4"):
            if f"{layer}.weight" in a:
                x = p.linear(a, layer, x if layer == "mlp_head.0" else x.relu())
        return x


def _lstm_shapes(c: PromptEncoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a bidirectional recurrent network's tensors, in torch's order; one by one, however many there are."""
    hidden = c.encoder_hidden_size or 0
    for layer in range(c.encoder_num_layers):
        for end in (f"l{layer}", f"l{layer}_reverse"):
            yield f"weight_ih_{end}", (4 * hidden, 2 * hidden if layer else c.width)
            yield f"weight_hh_{end}", (4 * hidden, hidden)
            yield f"bias_ih_{end}", (4 * hidden,)
            yield f"bias_hh_{end}", (4 * hidden,)


def _recurrent(c: PromptEncoderConfig, a: p.PromptView, table: p.Tensor) -> p.Tensor:
    """`(rows, width)` -> `(rows, 2 · hidden)`."""
    import torch

    weights = [a[f"lstm_head.{tail}"] for tail, _ in _lstm_shapes(c)]
    start = table.new_zeros(2 * c.encoder_num_layers, 1, c.encoder_hidden_size or 0)
    # arguments: input, state, weights, biases, layers, dropout, training, bidirectional, batch first
    options = True, c.encoder_num_layers, c.encoder_dropout, a.training, True, True
    out, *_ = torch.lstm(table[None], (start, start), weights, *options)
    return out[0]


def check(c: PromptEncoderConfig) -> p.Problems:
    """Options of the recurrent network that a perceptron does not have: its layers are the reference's number."""
    for name, usual in (("encoder_num_layers", 2), ("encoder_dropout", 0.0)):
        if c.encoder_reparameterization_type == "MLP" and getattr(c, name) != usual:
            what = f"`{name}: {getattr(c, name)}` has no effect with `encoder_reparameterization_type: MLP`"
            fix = "Leave it out, or set `encoder_reparameterization_type: LSTM`."
            yield p.rules.CONTRADICTION(what, fix=fix, where=name, severity=p.Severity.WARNING)


peftc_tuner = p.method(
    PromptEncoderConfig,
    PTuningTuner(),
    prefix="p_tuning_",
    encoder_class="PromptEncoder",
    exports=(PromptEncoderReparameterizationType,),
    check=check,
    examples=(
        {"num_virtual_tokens": 4, "encoder_hidden_size": 6},
        {"num_virtual_tokens": 4, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"},
    ),
)
