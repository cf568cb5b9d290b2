"""The optimisers that come with LoRA, as a spec names them (`train.optimizer`), and the options of each.

They serve every method with such factors; the functions that make them are in `functions`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftc import plugin as p

from .functions import create_loraplus_optimizer, create_riemannian_optimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from peftc import PeftModel


class LoraPlusOptions(p.AdamOptions):
    """Options of LoRA+, which moves by AdamW."""

    loraplus_lr_ratio: float = p.Field(default=16.0, gt=0)
    """How many times as fast B learns as A, which has the section's learning rate."""
    loraplus_lr_embedding: float = p.Field(default=1e-6, gt=0)
    """The learning rate of adapters of embeddings."""


class RiemannianOptions(p.AdamOptions):
    """Options of preconditioned AdamW."""

    reg: float = p.Field(default=1e-2, gt=0)
    """What is added to the diagonal of the matrices that are inverted."""


class LoraFaOptions(p.ConfigModel):
    """LoRA-FA has none: rank and scaling are the adapter's."""


def _loraplus(model: PeftModel, c: LoraPlusOptions, lr: float, decay: float) -> Optimizer:
    from torch.optim import AdamW

    return create_loraplus_optimizer(
        model,
        AdamW,
        lr=lr,
        loraplus_lr_ratio=c.loraplus_lr_ratio,
        loraplus_lr_embedding=c.loraplus_lr_embedding,
        loraplus_weight_decay=decay,
        betas=c.betas,
        eps=c.eps,
    )


def _riemannian(model: PeftModel, c: RiemannianOptions, lr: float, decay: float) -> Optimizer:
    from torch.optim import AdamW

    return create_riemannian_optimizer(model, AdamW, lr=lr, reg=c.reg, weight_decay=decay, betas=c.betas, eps=c.eps)


def _lorafa(model: PeftModel, c: LoraFaOptions, lr: float, decay: float) -> Optimizer:
    from peftc import projected_optimizer

    return projected_optimizer(model, lr, decay)


OPTIMIZERS = (
    p.NamedOptimizer(
        "loraplus",
        "LoRA+",
        LoraPlusOptions,
        make=_loraplus,
        summary="AdamW in which B learns faster than A.",
        paper="arXiv:2402.12354",
        fits=p.with_factors,
        needs="layers with two factors A and B that train",
        said={"loraplus_weight_decay": "weight_decay"},
    ),
    p.NamedOptimizer(
        "lorafa",
        "LoRA-FA",
        LoraFaOptions,
        make=_lorafa,
        summary="A stays as it begins, and B moves so that the product follows the gradient of the full weight.",
        paper="arXiv:2308.03303",
        fits=p.with_factors_alone,
        needs="layers with two factors A and B that train, and nothing else",
        takes_experts=False,
        freezes=True,
    ),
    p.NamedOptimizer(
        "riemannian",
        "preconditioned AdamW",
        RiemannianOptions,
        make=_riemannian,
        summary="AdamW for which the gradient of each factor is scaled by the other.",
        paper="arXiv:2402.02347",
        fits=p.with_linear_factors,
        needs="linear layers with two factors A and B that train",
        takes_experts=False,
    ),
)
