"""IA3: one learned vector per layer rescales its activations (Liu et al., arXiv:2205.05638, section 3.3).

Feed-forward layers have their input rescaled, all others their output. Merging rescales columns or rows of the weight;
rows together with the bias.
"""

from __future__ import annotations

from typing import Self

from peftc import plugin as p


class IA3Config(p.TargetsMixin, p.ExpertsMixin, p.OrientationMixin, p.ModulesToSaveMixin, p.PeftConfig):
    """Options of an IA3 adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("IA3")
    feedforward_modules: p.Names = None
    """Those of the targets whose input is rescaled instead of their output; a subset of `target_modules`, or of these and
    `target_parameters`."""
    init_ia3_weights: bool = True
    """Start at one, which changes nothing; otherwise at random."""

    @p.model_validator(mode="after")
    def _feedforward_is_subset(self) -> Self:
        targets, inputs, parameters = self.target_modules, self.feedforward_modules, self.target_parameters or ()
        if isinstance(targets, set) and isinstance(inputs, set) and not inputs <= targets.union(parameters):
            raise ValueError("`feedforward_modules` must be among `target_modules`")
        return self


class _Scale(p.MapTuner[IA3Config]):
    """One vector per layer, of ones at the start."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | p.EXPERT_KINDS

    def init(self, c: IA3Config, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        init.normal(slots["ia3_l"])
        if c.init_ia3_weights:
            init.ones(slots["ia3_l"])

    def combine(self, c: IA3Config, slots: p.TensorLists, weights: p.Weights) -> p.Tensors:
        return {"ia3_l": p.weighted_sum(slots["ia3_l"], weights)}


class OutputScale(_Scale):
    """`y = l * (W x + b)`."""

    def slots(self, c: IA3Config, layer: p.LayerFacts) -> p.Slots:
        out = layer.out_features
        yield p.parameter_slot("ia3_l", (1, out, *layer.ones) if layer.kernel else (out, 1))

    def output(self, a: p.View[IA3Config], y: p.Tensor) -> p.Tensor:
        return y * a.ia3_l.flatten()


class InputScale(_Scale):
    """`y = W (l * x) + b`."""

    def slots(self, c: IA3Config, layer: p.LayerFacts) -> p.Slots:
        yield p.parameter_slot("ia3_l", (1, layer.in_features, *layer.ones))

    def input(self, a: p.View[IA3Config], x: p.Tensor) -> p.Tensor:
        return x * a.ia3_l.flatten()


OUTPUT, INPUT = OutputScale(), InputScale()


def tuner_for(c: IA3Config, node: p.ModuleNode) -> p.MapTuner[IA3Config]:
    """Feed-forward layers are scaled before, the others after."""
    return INPUT if c.feedforward_modules and p.matches(c.feedforward_modules, node.path) else OUTPUT


peftc_tuner = p.method(
    IA3Config,
    tuner_for,
    choices=(OUTPUT, INPUT),
    prefix="ia3_",
    layer_names=("ia3_l",),
    default_targets={"target_modules": "ia3", "feedforward_modules": "ia3_feedforward"},
    # in the second, layers whose name ends in 0 are feed-forward ones: the kit's small models have both kinds then
    examples=({"feedforward_modules": []}, {"feedforward_modules": ".*0"}),
    identity_at_start=lambda c: c.init_ia3_weights,
)
