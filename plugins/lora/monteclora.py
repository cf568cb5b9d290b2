"""MonteCLoRA: in training A is the weighted mean of samples around it (Sengupta et al., arXiv:2411.04358).

`A' = Σ_n w_n (A + ε_n)`, with Gaussian noise whose variances and Dirichlet weights are learnt, and a term in the loss that
keeps them near their priors. Otherwise A is what it is, so that the adapter is merged and saved like any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftc import plugin as p

from .config import LoraConfig
from .nested import MontecloraConfig
from .plain import LoraTuner

#: What the reference calls the module that holds the distributions' parameters.
SAMPLER = "lora_monteclora_sampler"
STD, WEIGHTS = f"{SAMPLER}.std_prior", f"{SAMPLER}.expert_weights_prior"
VARIANCES, MEANS = f"{SAMPLER}.gaussian_var_prior", f"{SAMPLER}.expert_weights"
_LEAST = 1e-3  #: of a variance
_TINY = 1e-6


class MontecloraTuner(LoraTuner):
    """With parameters of the noise beside the factors; those of the last call are kept as buffers, as in the reference."""

    supports = p.LINEAR_KINDS
    stacks_experts = False
    draws_in_training = True
    of_rank = p.MapTuner.of_rank

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        yield from super().slots(c, layer)
        count = _options(c).num_samples
        yield p.module_slot(SAMPLER, (c.r,), "std_prior")
        yield p.module_slot(SAMPLER, (count,), "expert_weights_prior")
        for shape, name in (((c.r, c.r), "gaussian_var_prior"), ((count,), "expert_weights")):
            yield replace(p.module_slot(SAMPLER, shape, name, trainable=False), derived=True)

    def init(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        super().init(c, layer, slots, init)
        self._init_noise(slots, init)

    def before_start(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        super().before_start(c, layer, slots, init)
        self._init_noise(slots, init)

    @staticmethod
    def _init_noise(slots: p.Tensors, init: p.SlotInit) -> None:
        for label in (STD, WEIGHTS):  # uniform between 0 and 1
            init.uniform(slots[label], 0.5)
            slots[label].add_(0.5)

    def derive(self, c: LoraConfig, layer: p.LayerFacts, slots: p.LabelledSlots) -> p.Tensors:
        import torch

        count = _options(c).num_samples
        return {VARIANCES: torch.eye(c.r), MEANS: torch.full((count,), 1 / count)}

    def thin(self, a: p.View[LoraConfig]) -> p.Factors:
        A: p.Tensor = a.lora_A
        return (A + _noise(a, A) if a.training else A), a.lora_B, a.scaling

    def loss(self, c: LoraConfig, sites: Mapping[str, p.View[LoraConfig]], outputs: Any) -> p.Tensor | None:
        """The mean over layers of the divergences from the priors, weighted, and of `Σ w²` if it is asked for. What a layer
        drew counts once: for what is asked again before the next call there is nothing to add."""
        own, terms = _options(c), []
        for a in sites.values():
            drawn = a.noted.pop("drawn", None)
            if drawn is None:
                continue
            variances, weights = _variances(a, drawn[0]), _weights(a, drawn[1])
            divergence = _of_weights(a[WEIGHTS].exp(), own.dirichlet_prior) + _of_scales(a[STD])
            divergence = divergence + own.num_samples * 0.5 * (variances - variances.log() - 1).sum()
            term = own.kl_loss_weight * divergence
            terms.append(term + weights.square().sum() if own.use_entropy else term)
        return sum(terms[1:], terms[0]) / len(terms) if terms else None


def _options(c: LoraConfig) -> MontecloraConfig:
    assert c.monteclora_config is not None
    return c.monteclora_config


def _noise(a: p.View[LoraConfig], A: p.Tensor) -> p.Tensor:
    """`Σ_n w_n ε_n`, `(r, in)`. Numbers come from torch's generator, normal ones all."""
    import torch

    own, rank = _options(a.config), A.shape[0]
    normal = torch.randn(own.num_samples, A.shape[1], rank, dtype=A.dtype, device=A.device)
    squares = (
        torch.randn(rank, rank, dtype=A.dtype, device=A.device).square().sum(0)
    )  # the diagonal of a Wishart matrix
    deviates = torch.randn(own.num_samples, dtype=A.dtype, device=A.device)
    variances, weights = _variances(a, squares), _weights(a, deviates)
    with torch.no_grad():
        a[VARIANCES].copy_(variances.diag())
        a[MEANS].copy_(weights)
    a.noted["drawn"] = (squares, deviates)
    return torch.einsum("n,nir->ri", weights, normal) * (own.sample_scaler * variances.sqrt()).unsqueeze(1)


def _variances(a: p.View[LoraConfig], squares: p.Tensor) -> p.Tensor:
    """`(r,)`: of a Wishart distribution, scaled."""
    return ((2 * a[STD]).exp() * squares).clamp_min(_LEAST)


def _weights(a: p.View[LoraConfig], deviates: p.Tensor) -> p.Tensor:
    """`(samples,)`: of a Dirichlet distribution, by its normal approximation on logarithms."""
    concentration = a[WEIGHTS].exp().clamp_min(_TINY)
    inverse, count = 1 / concentration, deviates.shape[0]
    spread = (inverse * (1 - 2 / count) + inverse.sum() / count**2).clamp_min(_TINY) + _TINY
    logits = concentration.log() - concentration.log().mean() + spread.sqrt() * deviates
    return logits.softmax(-1)


def _of_weights(concentration: p.Tensor, prior: float) -> p.Tensor:
    """The divergence of a Dirichlet distribution from a symmetric one."""
    import torch

    count, total = concentration.shape[0], concentration.sum()
    before = torch.full_like(concentration, prior)
    own = torch.lgamma(total) - torch.lgamma(concentration).sum()
    other = torch.lgamma(before.sum()) - count * torch.lgamma(before[0])
    return own - other + ((concentration - before) * (concentration.digamma() - total.digamma())).sum()


def _of_scales(std: p.Tensor) -> p.Tensor:
    """That of a Wishart distribution with these scales from one with scales of 1."""
    rank, variances = std.shape[0], (2 * std).exp()
    return 0.5 * rank * (variances - 2 * std - 1).sum()


def get_monteclora_loss(self: Any, adapter_names: str | list[str] | None = None) -> p.Tensor | float:
    """What is still to be added to a loss for adapters, the active ones if none are named: nothing where the model has
    computed its loss itself, which has it."""
    found: p.Tensor | float = self.added_loss(adapter_names)
    return found


VARIANT = p.Variant(
    "LORA",
    "monteclora",
    MontecloraTuner(),
    chosen=lambda c: c.monteclora_config is not None,
    option="monteclora_config",
    layer_names=(SAMPLER,),
    summary="A is sampled in training.",
    paper="arXiv:2411.04358",
    examples=({"r": 4, "monteclora_config": {"num_samples": 3, "sample_scaler": 0.1, "use_entropy": True}},),
)
