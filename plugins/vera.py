"""VeRA: frozen random projections that all layers share, and two trained vectors per layer (Kopiczko et al., arXiv:2310.11454).

`ΔW = diag(b) B diag(d) A` (equation 2). A and B are as large as the largest layer needs, and each layer takes what it
needs of them. They are made from a seed, so a file can do without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from peftc.plugin import (
    CONV_KINDS,
    LINEAR_KINDS,
    Diagnostic,
    Field,
    Kind,
    LayerFacts,
    LayersMixin,
    MapTuner,
    ModulesToSaveMixin,
    Names,
    PeftConfig,
    PeftType,
    Share,
    Slot,
    SlotInit,
    TargetsMixin,
    TunerMethod,
    View,
    derived_slot,
    hookimpl,
    parameter_slot,
    rules,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor


class VeraConfig(TargetsMixin, LayersMixin, ModulesToSaveMixin, PeftConfig):
    """Options of a VeRA adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("VERA")
    r: int = Field(default=256, ge=1)
    """Rank of the update: higher than LoRA's, as far fewer numbers are trained."""
    exclude_modules: Names = Field(default=None, exclude_if=lambda value: value is None)
    """Names or one regular expression of modules that are left alone although they match."""
    projection_prng_key: int = 0
    """Seed of the projections; all adapters of a model have the same."""
    save_projection: bool = True
    """Whether files have the projections; without them they are made from the seed again."""
    vera_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping inputs of the update in training."""
    d_initial: float = 0.1
    """What every number of the vector d starts at."""
    fan_in_fan_out: bool = False
    """Whether the adapted layers store their weight as (in, out); set by itself where they do."""
    bias: str = "none"
    """Biases of the base model to train along: `none`, `all`, or `vera_only` for those of adapted layers."""
    init_weights: bool = True
    """Start without effect: d at `d_initial`, b at zero; otherwise d normal, b at one."""


class VeraTuner(MapTuner[VeraConfig]):
    """`y = W x + b * (B (d * (A x)))`."""

    supports = LINEAR_KINDS | CONV_KINDS | {Kind.EMBEDDING}

    def slots(self, c: VeraConfig, layer: LayerFacts) -> Iterable[Slot]:
        return self.declare([(c, layer)])[0]

    def declare(self, kinds: Sequence[tuple[VeraConfig, LayerFacts]]) -> Sequence[Iterable[Slot]]:
        inputs, outputs = max(_inputs(layer) for _, layer in kinds), max(layer.out_features for _, layer in kinds)
        return [
            (
                parameter_slot("vera_lambda_b", (layer.out_features,)),
                parameter_slot("vera_lambda_d", (c.r,)),
                derived_slot("vera_A", (c.r, inputs), c.save_projection, Share.MODEL),
                derived_slot("vera_B", (outputs, c.r), c.save_projection, Share.MODEL),
            )
            for c, layer in kinds
        ]

    def init(self, c: VeraConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        init.normal(slots["vera_lambda_d"])
        if c.init_weights:
            init.fill(slots["vera_lambda_d"], c.d_initial)
            init.zeros(slots["vera_lambda_b"])
        else:
            init.ones(slots["vera_lambda_b"])

    def derive(self, c: VeraConfig, layer: LayerFacts, slots: Mapping[str, Slot]) -> Mapping[str, Tensor]:
        import torch

        generator = torch.Generator().manual_seed(c.projection_prng_key)
        return {name: _uniform(slots[name].shape, generator) for name in ("vera_A", "vera_B")}

    def dropout(self, c: VeraConfig) -> float:
        return c.vera_dropout

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        # both vectors go into the second factor: the first is frozen, and its gradient need not be computed
        A, B = a.vera_A[:, : _inputs(a.layer)], a.vera_B[: a.layer.out_features]
        B = B * a.vera_lambda_b[:, None] * a.vera_lambda_d
        if a.layer.kernel:
            ones = (1,) * len(a.layer.kernel)
            return A.reshape(A.shape[0], -1, *a.layer.kernel), B.reshape(*B.shape, *ones), a.scaling
        return A, B, a.scaling


def _inputs(layer: LayerFacts) -> int:
    """Numbers that an output of the layer is computed from."""
    return layer.in_features // layer.groups * math.prod(layer.kernel)


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform with the variance `2 / fan-in` (He et al. 2015, equation 14), as the reference draws it."""
    import torch

    bound = math.sqrt(6.0 / shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def check(c: VeraConfig) -> Iterable[Diagnostic]:
    """Values without a meaning."""
    if c.bias not in ("none", "all", "vera_only"):
        yield rules.BAD_VALUE(f"`bias` cannot be `{c.bias}`", fix="Use `none`, `all` or `vera_only`.", where="bias")


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "VERA",
        VeraConfig,
        VeraTuner(),
        prefix="vera_lambda_",
        layer_names=("vera_lambda_b", "vera_lambda_d"),
        layer_options={"r": "r"},
        layer_dropout="vera_dropout",
        default_targets={"target_modules": "vera"},
        alike=("projection_prng_key", "save_projection"),
        summary="Random projections shared by all layers, with two trained vectors for each.",
        paper="arXiv:2310.11454",
        examples=(
            {"r": 8},
            {"r": 8, "save_projection": False, "projection_prng_key": 7},
            {"r": 4, "init_weights": False},
        ),
        check=check,
        identity_at_start=lambda c: c.init_weights,
    )
