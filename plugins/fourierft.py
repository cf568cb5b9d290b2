"""FourierFT: a few trained Fourier coefficients of each weight's update (Gao et al., arXiv:2405.03003, equations 2 to 4).

`ΔW = s · Re(F^-1(E))`, where E `(out, in)` is zero but at n places drawn from a seed. Files have the n coefficients only.
The inverse transform is made once per forward; the layer then runs once, with the changed weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from peftc import plugin as p


class FourierFTConfig(p.ExpertsMixin, p.OrientationMixin, p.BiasMixin, p.InitWeightsMixin, p.LayersConfig):
    """Options of a FourierFT adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("FOURIERFT")
    n_frequency: p.Count = 1000
    """How many coefficients are trained for each layer."""
    scaling: float = 150.0
    """Factor of the update; 100 to 300 are usual."""
    random_loc_seed: int | None = 777
    """Seed of the places of the coefficients."""
    bias: Literal["none", "all", "fourier_only", "fourierft_only"] = "none"
    """Biases of the base model to train along: `none`, `all`, or `fourier_only` for those of adapted layers (`fourierft_only` means
    the same)."""
    n_frequency_pattern: dict[str, int] | None = p.Field(default_factory=dict)
    """Other numbers for some modules: pattern over the end of the path -> `n_frequency`."""
    init_weights: bool = False
    """Start with all coefficients at zero, without effect; otherwise at random."""

    pattern_options: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}


class FourierTuner(p.MapTuner[FourierFTConfig]):
    """`W' = W + ΔW`, the kernel of a convolution flattened into its inputs."""

    supports = p.CONV_KINDS | {p.Kind.EMBEDDING}
    additive = True
    rank_limit = p.RankLimit("n_frequency", lambda layer: layer.out_features * layer.fan_in, is_hard=True)

    def slots(self, c: FourierFTConfig, layer: p.LayerFacts) -> p.Slots:
        yield p.parameter_slot("fourierft_spectrum", (c.n_frequency,))
        # a permutation of all places is drawn: once for all layers of a size, not for each
        size = f"{layer.out_features * layer.fan_in} {c.n_frequency}"
        yield p.derived_slot("fourierft_places", (c.n_frequency,), share=size, dtype="int64")

    def init(self, c: FourierFTConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        init.normal(slots["fourierft_spectrum"])
        if c.init_weights:
            init.zeros(slots["fourierft_spectrum"])

    def derive(self, c: FourierFTConfig, layer: p.LayerFacts, slots: p.LabelledSlots) -> p.Tensors:
        import torch

        generator = torch.Generator().manual_seed(c.random_loc_seed or 0)
        places = torch.randperm(layer.out_features * layer.fan_in, generator=generator)
        return {"fourierft_places": places[: c.n_frequency].clone()}

    def scaling(self, c: FourierFTConfig, layer: p.LayerFacts) -> float:
        return c.scaling

    def combine(self, c: FourierFTConfig, slots: p.TensorLists, weights: p.Weights) -> p.Tensors:
        first, *others = slots["fourierft_places"]
        if any(not first.equal(places) for places in others):
            fix = "Combine adapters with the same `random_loc_seed` and `n_frequency`."
            raise p.PeftcError(p.rules.CANNOT_COMBINE("Their coefficients are at different places", fix=fix))
        return {"fourierft_spectrum": p.weighted_sum(slots["fourierft_spectrum"], weights)}

    def params(self, a: p.View[FourierFTConfig], w: p.Tensors, w0: p.Tensors) -> p.Tensors:
        return {**w, "weight": w["weight"] + _update(a)}


class LinearFourierTuner(FourierTuner):
    """The same beside the layer, for linear ones in half precision: added to the weight, a small update would be lost."""

    supports = p.LINEAR_KINDS | p.EXPERT_KINDS
    branch_is_dense = True

    def branch(self, a: p.View[FourierFTConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        return x @ _update(a).t()


def _update(a: p.View[FourierFTConfig]) -> p.Tensor:
    """ΔW `(out, in · kernel)`, in the dtype of the coefficients."""
    import torch

    values, out, into = a.fourierft_spectrum, a.layer.out_features, a.layer.fan_in
    wide = p.widened(values)
    spectrum = wide.new_zeros(out * into).index_copy(0, a.fourierft_places, wide * a.scaling)
    update: p.Tensor = torch.fft.ifft2(spectrum.view(out, into)).real.to(values.dtype)
    return update


def check(c: FourierFTConfig) -> p.Problems:
    """Places that nothing would say."""
    if c.random_loc_seed is None:
        what = "`random_loc_seed` is null: files do not say where the coefficients are, only the seed does"
        yield p.rules.BAD_VALUE(what, fix="Give a number.", where="random_loc_seed")


peftc_tuner = p.method(
    FourierFTConfig,
    (LinearFourierTuner(), FourierTuner()),
    prefix="fourierft_",
    layer_names=("fourierft_spectrum",),
    layer_options={f"fourierft_{name}": name for name in ("n_frequency", "scaling", "random_loc_seed")},
    examples=(  # the usual scaling is for weights with far more entries than those of tiny layers
        {"n_frequency": 6, "scaling": 20.0},
        {"n_frequency": 6, "scaling": 10.0, "init_weights": True, "random_loc_seed": 5},
    ),
    check=check,
)
