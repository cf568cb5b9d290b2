"""Options of single variants, in classes of their own, named as in the reference."""

from __future__ import annotations

from typing import Literal, Self

from peftc import plugin as p


class BdLoraConfig(p.ConfigModel):
    """Which factors are block-diagonal (BD-LoRA)."""

    target_modules_bd_a: p.NameList = None
    """Texts that occur in the paths of modules whose A is block-diagonal: those that are split by rows when served."""
    target_modules_bd_b: p.NameList = None
    """The same for B: those that are split by columns."""
    nblocks: p.Count = 1
    """Number of blocks, as of the parts that a model is served in."""
    match_strict: bool = True
    """Refuse target modules of which neither is block-diagonal."""

    @p.model_validator(mode="after")
    def _are_apart(self) -> Self:
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        if both:
            raise ValueError(f"`target_modules_bd_a` and `target_modules_bd_b` both have {both}")
        return self


class VeloraConfig(p.ConfigModel):
    """How inputs are compressed for backward (VeLoRA)."""

    num_groups: p.Count = 64
    """Parts that the features of an input are divided into, of each of which one number is kept."""
    scale: float = p.Field(default=1.0, gt=0)
    """Factor of what is made of these numbers again."""
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"
    """The direction that the parts are projected on: the mean of each batch, of the first one, or a random one."""


class MontecloraConfig(p.ConfigModel):
    """How A is sampled in training (MonteCLoRA)."""

    num_samples: p.Count = 8
    """Samples that A is the weighted mean of, at each call."""
    use_entropy: bool = False
    """Add the sum of the squared weights of samples to the loss."""
    dirichlet_prior: float = p.Field(default=0.1, gt=0)
    """Prior concentration of these weights."""
    sample_scaler: float = p.Field(default=1e-4, ge=0)
    """Size of the noise."""
    kl_loss_weight: float = p.Field(default=1e-5, ge=0)
    """Weight of the divergence from the priors in the loss."""
    buffer_size: p.Count = 150
    """Kept for files of the reference: random numbers are drawn here when they are needed."""


class ArrowConfig(p.ConfigModel):
    """How a router weighs the other adapters (Arrow)."""

    top_k: p.Count = 3
    """Adapters that act on a token, those it is most alike."""
    router_temperature: float = p.Field(default=1.0, gt=0)
    """Divides likenesses before the softmax: below 1 sharper, above it flatter."""
    use_gks: bool = False
    """Weigh the adapters without what the general ones, `gks_0` and so on, have in the mean (GenKnowSub)."""
    task_adapter_names: p.NameList = None
    """The adapters that were there first. All that are on a layer are weighed, but for routers and general ones."""
    gks_adapter_names: p.NameList = None
    """The general adapters that were there first. All that are called so count."""
    rng_seed: int | None = None
    """Seed of the vector from which the search for each adapter's direction starts; left out, any."""


class KasaConfig(p.ConfigModel):
    """Weights of the terms that KaSA adds to the loss."""

    beta: float = p.Field(default=1e-4, ge=0)
    """Of the squared singular values of the update."""
    gamma: float = p.Field(default=1e-3, ge=0)
    """Of the distance of its factors from orthonormal ones."""
