"""LoRA with a bias of its own: `y = W x + s · (B A x + c)`, of which the layer's bias takes `s · c` when it is merged.

It is what an adapter extracted from a trained model may need, whose biases have changed as well.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftc import plugin as p

from .config import LoraConfig
from .plain import LoraTuner


class BiasTuner(LoraTuner):
    """On layers with a bias."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS
    stacks_experts = False
    thin = p.MapTuner.thin
    of_rank = p.MapTuner.of_rank
    of_thin = p.MapTuner.of_thin

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        yield from super().slots(c, layer)
        yield p.module_slot("lora_B", (layer.out_features,), "bias")

    def init(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        first, second, bias = slots.values()
        bound = (second.shape[0] / max(1, second.numel())) ** 0.5  # as torch's own layers start
        if c.init_lora_weights is False:
            init.kaiming_uniform(first)
            init.kaiming_uniform(second)
            init.uniform(bias, bound)
            return
        for slot in slots.values():  # the reference's modules draw once when they are made
            init.skip_uniform(slot)
        init.kaiming_uniform(first)
        init.zeros(second)
        init.zeros(bias)

    def branch(self, a: p.View[LoraConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        B, bias = a["lora_B.weight"], a["lora_B.bias"]
        update = a.up(B, a.down(a.lora_A, x))
        return (update + bias.view(-1, *(1 for _ in a.layer.kernel))) * a.scaling

    def params(self, a: p.View[LoraConfig], w: p.Tensors, w0: p.Tensors) -> p.Tensors:
        A, B, bias = a.lora_A.flatten(1), a["lora_B.weight"].flatten(1), a["lora_B.bias"]
        return {**w, "weight": w["weight"] + a.scaling * (B @ A), "bias": w["bias"] + a.scaling * bias}


class BesideBiasTuner(BiasTuner):
    """On layers without a bias, and on convolutions of several groups, which it stays beside."""

    beside = "its bias has no place there"
    additive = False
    params = p.MapTuner.params

    def check(self, c: LoraConfig, layer: p.LayerFacts, path: str) -> Iterator[p.Diagnostic]:
        yield from super().check(c, layer, path)
        if not layer.has_bias:
            what = f"`lora_bias` gives `{path}` a bias, and the layer has none"
            fix = "Set `lora_bias: false` if the adapter is to be merged."
            why = "The adapter works beside the layer and cannot be merged into it."
            yield p.rules.CANNOT_MERGE(what, why=why, fix=fix, where=path, severity=p.Severity.WARNING)


BIAS, BESIDE = BiasTuner(), BesideBiasTuner()


def tuner_for(c: LoraConfig, node: p.ModuleNode) -> BiasTuner:
    """That which can be merged where the layer has what it takes."""
    return BIAS if node.facts.has_bias and node.facts.groups == 1 else BESIDE


def check(c: LoraConfig) -> p.Problems:
    """As in the reference, only with starts that leave the bias at zero, or at random."""
    if c.init_lora_weights not in (True, False):
        what = f"`lora_bias` cannot begin as `init_lora_weights: {c.init_lora_weights}` says"
        yield p.rules.CONTRADICTION(
            what, fix="Set `init_lora_weights` to `true` or `false`.", where="init_lora_weights"
        )


VARIANT = p.Variant(
    "LORA",
    "bias",
    tuner_for,
    choices=(BIAS, BESIDE),
    chosen=lambda c: c.lora_bias,
    option="lora_bias",
    check=check,
    summary="The update has a bias of its own.",
    examples=({"r": 4, "lora_bias": True},),
)
