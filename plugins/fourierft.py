"""FourierFT: a weight update with few trained Fourier coefficients (Gao et al., arXiv:2405.03003, equations 2 to 4).

`ΔW = s · Re(F^-1(E))`, where E `(out, in)` is zero but at n places drawn from a seed. Files have the n coefficients only.
The inverse transform is made once per forward; the layer then runs once, with the changed weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from peftc.plugin import (
    CONV_KINDS,
    EXPERT_KINDS,
    LINEAR_KINDS,
    Diagnostic,
    ExpertsMixin,
    Field,
    Kind,
    LayerFacts,
    LayersMixin,
    MapTuner,
    ModulesToSaveMixin,
    PeftcError,
    PeftConfig,
    PeftType,
    Severity,
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
    from torch import Tensor


class FourierFTConfig(TargetsMixin, ExpertsMixin, LayersMixin, ModulesToSaveMixin, PeftConfig):
    """Options of a FourierFT adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("FOURIERFT")
    n_frequency: int = Field(default=1000, ge=1)
    """How many coefficients are trained for each layer."""
    scaling: float = 150.0
    """Factor of the update; 100 to 300 are usual."""
    random_loc_seed: int | None = 777
    """Seed of the places of the coefficients."""
    fan_in_fan_out: bool = False
    """Whether the adapted layers store their weight as (in, out); set by itself where they do."""
    bias: str = "none"
    """Biases of the base model to train along: `none`, `all`, or `fourier_only` for those of adapted layers (`fourierft_only` means
    the same)."""
    n_frequency_pattern: dict[str, int] | None = Field(default_factory=dict)
    """Other numbers for some modules: pattern over the end of the path -> `n_frequency`."""
    init_weights: bool = False
    """Start with all coefficients at zero, without effect; otherwise at random."""

    pattern_options: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}


class FourierTuner(MapTuner[FourierFTConfig]):
    """`W' = W + ΔW`, the kernel of a convolution flattened into its inputs."""

    supports = CONV_KINDS | {Kind.EMBEDDING}
    additive = True

    def slots(self, c: FourierFTConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("fourierft_spectrum", (c.n_frequency,))
        # a permutation of all places is drawn: once for all layers of a size, not for each
        size = f"{layer.out_features * _inputs(layer)} {c.n_frequency}"
        yield derived_slot("fourierft_places", (c.n_frequency,), share=size, dtype="int64")

    def init(self, c: FourierFTConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        init.normal(slots["fourierft_spectrum"])
        if c.init_weights:
            init.zeros(slots["fourierft_spectrum"])

    def derive(self, c: FourierFTConfig, layer: LayerFacts, slots: Mapping[str, Slot]) -> Mapping[str, Tensor]:
        import torch

        generator = torch.Generator().manual_seed(c.random_loc_seed or 0)
        places = torch.randperm(layer.out_features * _inputs(layer), generator=generator)
        return {"fourierft_places": places[: c.n_frequency].clone()}

    def scaling(self, c: FourierFTConfig, layer: LayerFacts) -> float:
        return c.scaling

    def check(self, c: FourierFTConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        size = layer.out_features * _inputs(layer)
        if c.n_frequency > size:
            yield rules.RANK_BEYOND_LAYER(
                f"{c.n_frequency} coefficients are more than the {size} of the weight of `{path}`",
                fix=f"Set `n_frequency`, or an `n_frequency_pattern` for it, to at most {size}.",
                where=path,
                severity=Severity.ERROR,
            )

    def combine(
        self, c: FourierFTConfig, slots: Mapping[str, Sequence[Tensor]], weights: Sequence[float]
    ) -> Mapping[str, Tensor]:
        first, *others = slots["fourierft_places"]
        if any(not first.equal(places) for places in others):
            what = "Their coefficients are at different places"
            fix = "Combine adapters with the same `random_loc_seed` and `n_frequency`."
            raise PeftcError(rules.CANNOT_COMBINE(what, fix=fix))
        pairs = zip(slots["fourierft_spectrum"], weights, strict=True)
        return {"fourierft_spectrum": sum((weight * own for own, weight in pairs), 0 * slots["fourierft_spectrum"][0])}

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**p, "weight": p["weight"] + _update(a)}


class LinearFourierTuner(FourierTuner):
    """The same beside the layer, for linear ones in half precision: added to the weight, a small update would be lost."""

    supports = LINEAR_KINDS | EXPERT_KINDS
    branch_is_dense = True

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        return x @ _update(a).t()


def _inputs(layer: LayerFacts) -> int:
    """Numbers that an output of the layer is computed from."""
    return layer.in_features // layer.groups * math.prod(layer.kernel)


def _update(a: View) -> Tensor:
    """ΔW `(out, in · kernel)`, in the dtype of the coefficients; there is no transform in half precision."""
    import torch

    values = a.fourierft_spectrum
    wide = values if values.dtype.itemsize >= 4 else values.float()
    shape = a.layer.out_features, _inputs(a.layer)
    spectrum = wide.new_zeros(math.prod(shape)).index_copy(0, a.fourierft_places, wide * a.scaling)
    update: Tensor = torch.fft.ifft2(spectrum.view(shape)).real.to(values.dtype)
    return update


def check(c: FourierFTConfig) -> Iterable[Diagnostic]:
    """Values without a meaning."""
    if c.bias not in ("none", "all", "fourier_only", "fourierft_only"):
        yield rules.BAD_VALUE(f"`bias` cannot be `{c.bias}`", fix="Use `none`, `all` or `fourier_only`.", where="bias")
    if c.random_loc_seed is None:
        what = "`random_loc_seed` is null: files do not say where the coefficients are, only the seed does"
        yield rules.BAD_VALUE(what, fix="Give a number.", where="random_loc_seed")


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "FOURIERFT",
        FourierFTConfig,
        (LinearFourierTuner(), FourierTuner()),
        prefix="fourierft_",
        layer_names=("fourierft_spectrum",),
        layer_options={
            "fourierft_n_frequency": "n_frequency",
            "fourierft_scaling": "scaling",
            "fourierft_random_loc_seed": "random_loc_seed",
        },
        model_class="FourierFTModel",
        layer_class="FourierFTLayer",
        default_targets={"target_modules": "fourierft"},
        summary="A few trained Fourier coefficients of each weight's update.",
        paper="arXiv:2405.03003",
        examples=(  # the usual scaling is for weights with far more entries than those of tiny layers
            {"n_frequency": 6, "scaling": 20.0},
            {"n_frequency": 6, "scaling": 10.0, "init_weights": True, "random_loc_seed": 5},
        ),
        check=check,
        identity_at_start=lambda c: c.init_weights,
    )
