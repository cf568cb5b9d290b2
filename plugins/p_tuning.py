"""P-tuning: virtual tokens that a small network makes of a trained table (Liu et al., arXiv:2103.10385, section 3.2).

The network only helps training: what is saved is its output, and a loaded adapter is that table alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

from peftc.plugin import (
    Diagnostic,
    Field,
    PeftType,
    PromptContext,
    PromptLearningConfig,
    PromptTuner,
    PromptView,
    Severity,
    Slot,
    TunerMethod,
    hookimpl,
    module_slot,
    rules,
)

if TYPE_CHECKING:
    from torch import Tensor

    from peftc.plugin import Tensors

#: Layers of the perceptron, whatever `encoder_num_layers` says. The reference's number.
_MLP_LAYERS = 2


class PromptEncoderReparameterizationType(StrEnum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


class PromptEncoderConfig(PromptLearningConfig):
    """Options of a P-tuning adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("P_TUNING")
    encoder_reparameterization_type: PromptEncoderReparameterizationType = Field(
        default=PromptEncoderReparameterizationType.MLP, strict=False
    )
    """The network: a perceptron (`MLP`), or a bidirectional recurrent one and a perceptron (`LSTM`)."""
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Width of the network; left out, that of the virtual tokens."""
    encoder_num_layers: int = Field(default=2, ge=1)
    """Layers of the recurrent network."""
    encoder_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability of dropping what goes between layers of the recurrent network, in training."""


class PTuningTuner(PromptTuner[PromptEncoderConfig]):
    """A table, and the network that turns it into virtual tokens."""

    def slots(self, c: PromptEncoderConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        yield from self.encoded(c, dims)
        width, hidden = c.token_dim or 0, c.encoder_hidden_size or 0
        if c.encoder_reparameterization_type == "MLP":
            sizes = {"0": (hidden, width), "2": (hidden, hidden), "4": (width, hidden)}
        else:
            for tail, shape in _lstm_shapes(c).items():
                yield module_slot("lstm_head", shape, tail)
            sizes = {"0": (2 * hidden, 2 * hidden), "2": (width, 2 * hidden)}
        for position, (out, into) in sizes.items():
            yield module_slot("mlp_head", (out, into), f"{position}.weight")
            yield module_slot("mlp_head", (out,), f"{position}.bias")

    def encoded(self, c: PromptEncoderConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        rows = (c.num_virtual_tokens or 0) * (c.num_transformer_submodules or 1)
        yield module_slot("embedding", (rows, c.token_dim or 0))

    def init(self, c: PromptEncoderConfig, slots: Mapping[str, Tensor], context: PromptContext) -> None:
        """As torch starts such layers."""
        for label, tensor in slots.items():
            if label == "embedding":
                context.init.normal(tensor)
            elif label.startswith("lstm_head"):
                context.init.uniform(tensor, (c.encoder_hidden_size or 1) ** -0.5)
            else:
                into = slots[label.removesuffix(".bias") + ".weight"] if label.endswith(".bias") else tensor
                context.init.uniform(tensor, into.shape[1] ** -0.5)

    def embeds(self, c: PromptEncoderConfig, a: PromptView) -> Tensor:
        table = a["embedding"]
        if "mlp_head.0.weight" not in a:
            return table
        return _perceptron(a, _recurrent(c, a, table) if "lstm_head.weight_ih_l0" in a else table)

    def restore(self, c: PromptEncoderConfig, saved: Tensors) -> Mapping[str, Tensor]:
        return {"embedding": saved["prompt_embeddings"]}


def _lstm_shapes(c: PromptEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a bidirectional recurrent network's tensors by torch's names, in torch's order."""
    hidden = c.encoder_hidden_size or 0
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(c.encoder_num_layers):
        into = (c.token_dim or 0) if layer == 0 else 2 * hidden
        for end in (f"l{layer}", f"l{layer}_reverse"):
            shapes[f"weight_ih_{end}"] = (4 * hidden, into)
            shapes[f"weight_hh_{end}"] = (4 * hidden, hidden)
            shapes[f"bias_ih_{end}"] = (4 * hidden,)
            shapes[f"bias_hh_{end}"] = (4 * hidden,)
    return shapes


def _recurrent(c: PromptEncoderConfig, a: PromptView, table: Tensor) -> Tensor:
    """`(rows, width)` -> `(rows, 2 · hidden)`."""
    import torch

    weights = [a[f"lstm_head.{tail}"] for tail in _lstm_shapes(c)]
    start = table.new_zeros(2 * c.encoder_num_layers, 1, c.encoder_hidden_size or 0)
    # arguments: input, state, weights, biases, layers, dropout, training, bidirectional, batch first
    out: Tensor = torch.lstm(
        table[None], (start, start), weights, True, c.encoder_num_layers, c.encoder_dropout, a.training, True, True
    )[0]
    return out[0]


def _perceptron(a: PromptView, x: Tensor) -> Tensor:
    """Linear layers with a rectifier between them."""
    from torch.nn.functional import linear

    x = linear(x, a["mlp_head.0.weight"], a["mlp_head.0.bias"])
    for position in ("2", "4"):
        if f"mlp_head.{position}.weight" in a:
            x = linear(x.relu(), a[f"mlp_head.{position}.weight"], a[f"mlp_head.{position}.bias"])
    return x


def _check(c: PromptEncoderConfig) -> Iterator[Diagnostic]:
    """Options of the recurrent network that a perceptron does not have."""
    if c.encoder_reparameterization_type != "MLP":
        return
    for name, usual in (("encoder_num_layers", _MLP_LAYERS), ("encoder_dropout", 0.0)):
        value = getattr(c, name)
        if value != usual:
            what = f"`{name}: {value}` has no effect with `encoder_reparameterization_type: MLP`"
            fix = "Leave it out, or set `encoder_reparameterization_type: LSTM`."
            yield rules.CONTRADICTION(what, fix=fix, where=name, severity=Severity.WARNING)


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "P_TUNING",
        PromptEncoderConfig,
        PTuningTuner(),
        prefix="p_tuning_",
        encoder_class="PromptEncoder",
        exports={"PromptEncoderReparameterizationType": PromptEncoderReparameterizationType},
        summary="Virtual tokens before the input, made by a small network while they are trained.",
        paper="arXiv:2103.10385",
        check=_check,
        examples=(
            {"num_virtual_tokens": 4, "encoder_hidden_size": 6},
            {"num_virtual_tokens": 4, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"},
        ),
        identity_at_start=lambda c: False,
    )
