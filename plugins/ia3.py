"""IA3: learned vectors that rescale activations (Liu et al., arXiv:2205.05638, section 3.3).

Feed-forward layers have their input rescaled, all others their output. Merging rescales columns or rows of the weight;
rows together with the bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from peftc.plugin import (
    CONV_KINDS,
    EXPERT_KINDS,
    LINEAR_KINDS,
    ExpertsMixin,
    LayerFacts,
    MapTuner,
    ModuleNode,
    ModulesToSaveMixin,
    Names,
    PeftConfig,
    PeftType,
    Slot,
    SlotInit,
    TargetsMixin,
    TunerMethod,
    View,
    hookimpl,
    matches,
    model_validator,
    parameter_slot,
)

if TYPE_CHECKING:
    from torch import Tensor


class IA3Config(TargetsMixin, ExpertsMixin, ModulesToSaveMixin, PeftConfig):
    """Options of an IA3 adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("IA3")
    feedforward_modules: Names = None
    """Those of the targets whose input is rescaled instead of their output; a subset of `target_modules`, or of these and
    `target_parameters`."""
    fan_in_fan_out: bool = False
    """Whether the adapted layers store their weight as (in, out); set by itself where they do."""
    init_ia3_weights: bool = True
    """Start at one, which changes nothing; otherwise at random."""

    @model_validator(mode="after")
    def _feedforward_is_subset(self) -> Self:
        targets, inputs, parameters = self.target_modules, self.feedforward_modules, self.target_parameters or ()
        if isinstance(targets, set) and isinstance(inputs, set) and not inputs <= targets.union(parameters):
            raise ValueError("`feedforward_modules` must be among `target_modules`")
        return self


class _Scale(MapTuner[IA3Config]):
    """One vector per layer, of ones at the start."""

    supports = LINEAR_KINDS | CONV_KINDS | EXPERT_KINDS

    def init(self, c: IA3Config, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        init.normal(slots["ia3_l"])
        if c.init_ia3_weights:
            init.ones(slots["ia3_l"])

    def combine(
        self, c: IA3Config, slots: Mapping[str, Sequence[Tensor]], weights: Sequence[float]
    ) -> Mapping[str, Tensor]:
        """The weighted sum of the vectors."""
        import torch

        return {"ia3_l": torch.stack([v * w for v, w in zip(slots["ia3_l"], weights, strict=True)]).sum(dim=0)}


class OutputScale(_Scale):
    """`y = l * (W x + b)`."""

    def slots(self, c: IA3Config, layer: LayerFacts) -> Iterable[Slot]:
        out = layer.out_features
        yield parameter_slot("ia3_l", (1, out, *_ones(layer)) if layer.kernel else (out, 1))

    def output(self, a: View, y: Tensor) -> Tensor:
        return y * a.ia3_l.flatten()


class InputScale(_Scale):
    """`y = W (l * x) + b`."""

    def slots(self, c: IA3Config, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("ia3_l", (1, layer.in_features, *_ones(layer)))

    def input(self, a: View, x: Tensor) -> Tensor:
        return x * a.ia3_l.flatten()


def _ones(layer: LayerFacts) -> tuple[int, ...]:
    return (1,) * len(layer.kernel)


OUTPUT, INPUT = OutputScale(), InputScale()


def tuner_for(c: IA3Config, node: ModuleNode) -> MapTuner[IA3Config]:
    """Feed-forward layers are scaled before, the others after."""
    return INPUT if c.feedforward_modules and matches(c.feedforward_modules, node.path) else OUTPUT


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "IA3",
        IA3Config,
        tuner_for,
        choices=(OUTPUT, INPUT),
        prefix="ia3_",
        layer_names=("ia3_l",),
        model_class="IA3Model",
        layer_class="IA3Layer",
        default_targets={"target_modules": "ia3", "feedforward_modules": "ia3_feedforward"},
        summary="One learned vector per layer rescales its activations.",
        paper="arXiv:2205.05638",
        # in the second, layers whose name ends in 0 are feed-forward ones: the kit's small models have both kinds then
        examples=({"feedforward_modules": []}, {"feedforward_modules": ".*0"}),
        identity_at_start=lambda c: c.init_ia3_weights,
    )
