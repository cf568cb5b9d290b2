"""VeRA: random projections shared by all layers, with two trained vectors for each (Kopiczko et al., arXiv:2310.11454).

`ΔW = diag(b) B diag(d) A` (equation 2). A and B are as large as the largest layer needs, and each layer takes what it
needs of them. They are made from a seed, so a file can do without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from peftc import plugin as p


class VeraConfig(p.OwnExclusionsMixin, p.OrientationMixin, p.BiasMixin, p.InitWeightsMixin, p.LayersConfig):
    """Options of a VeRA adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("VERA")
    r: p.Count = 256
    """Rank of the update: higher than LoRA's, as far fewer numbers are trained."""
    projection_prng_key: int = 0
    """Seed of the projections; all adapters of a model have the same."""
    save_projection: bool = True
    """Whether files have the projections; without them they are made from the seed again."""
    vera_dropout: p.Dropout = 0.0
    d_initial: float = 0.1
    """What every number of the vector d starts at."""
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True
    """Start without effect: d at `d_initial`, b at zero; otherwise d normal, b at one."""


class VeraTuner(p.MapTuner[VeraConfig]):
    """`y = W x + b * (B (d * (A x)))`."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | {p.Kind.EMBEDDING}
    dropout_option = "vera_dropout"

    def slots(self, c: VeraConfig, layer: p.LayerFacts) -> p.Slots:
        return self.declare([(c, layer)])[0]

    def declare(self, kinds: Sequence[tuple[VeraConfig, p.LayerFacts]]) -> Sequence[p.Slots]:
        into, out = max(layer.fan_in for _, layer in kinds), max(layer.out_features for _, layer in kinds)
        return [
            (
                p.parameter_slot("vera_lambda_b", (layer.out_features,)),
                p.parameter_slot("vera_lambda_d", (c.r,)),
                p.derived_slot("vera_A", (c.r, into), c.save_projection, p.Share.MODEL),
                p.derived_slot("vera_B", (out, c.r), c.save_projection, p.Share.MODEL),
            )
            for c, layer in kinds
        ]

    def init(self, c: VeraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        init.normal(slots["vera_lambda_d"])
        if c.init_weights:
            init.fill(slots["vera_lambda_d"], c.d_initial)
            init.zeros(slots["vera_lambda_b"])
        else:
            init.ones(slots["vera_lambda_b"])

    def derive(self, c: VeraConfig, layer: p.LayerFacts, slots: p.LabelledSlots) -> p.Tensors:
        """Uniform with the variance `2 / fan-in` (He et al. 2015, equation 14), as the reference draws them."""
        import torch

        generator = torch.Generator().manual_seed(c.projection_prng_key)
        bounds = {name: math.sqrt(6.0 / slots[name].shape[1]) for name in ("vera_A", "vera_B")}
        return {
            name: torch.empty(slots[name].shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            for name, bound in bounds.items()
        }

    def thin(self, a: p.View[VeraConfig]) -> p.Factors:
        # both vectors go into the second factor: the first is frozen, and its gradient need not be computed
        A, B = a.vera_A[:, : a.layer.fan_in], a.vera_B[: a.layer.out_features]
        return A, B * a.vera_lambda_b[:, None] * a.vera_lambda_d, a.scaling


peftc_tuner = p.method(
    VeraConfig,
    VeraTuner(),
    prefix="vera_lambda_",
    layer_names=("vera_lambda_b", "vera_lambda_d"),
    layer_options=("r",),
    alike=("projection_prng_key", "save_projection"),
    examples=({"r": 8}, {"r": 8, "save_projection": False, "projection_prng_key": 7}, {"r": 4, "init_weights": False}),
)
