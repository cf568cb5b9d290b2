"""Functions of the reference that belong to LoRA: conversion of other adapters into one, and its optimisers."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from peftc import plugin as p

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from peftc import PeftModel


def convert_to_lora(
    model: p.nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: p.Options | None = None,
) -> tuple[p.PeftConfig, p.Tensors]:
    """An adapter of any method that changes weights as a LoRA: its config, and its tensors by checkpoint key.

    Each layer's change is replaced by the closest one of the rank, or of the smallest rank that keeps a share of the squared
    singular values, if `rank` is a fraction. Warns of the error; `peftc.convert_adapter` gives it layer by layer.
    `compile_kwargs` is accepted and not needed. Raises `PeftcError`, also a `ValueError` and `TypeError`, for what cannot be
    converted.
    """
    if compile_kwargs is not None:
        p.warn([p.rules.WITHOUT_EFFECT("`compile_kwargs` compiles nothing here", fix="Leave it out.")])
    return p.convert_adapter(model, "LORA", rank, adapter_name, progressbar)


def save_as_lora(
    path: str | PathLike[str],
    model: p.nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: p.Options | None = None,
) -> None:
    """Save what `convert_to_lora` gives, whole or not at all, into a folder that is made if needed."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    p.write_adapter(fspath(path), config, tensors)


def reduce_intruder_dimension(
    peft_model: PeftModel,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
) -> None:
    """Add, and activate, an adapter that is another one with less of its intruder dimensions (arXiv:2410.21228), so that the model
    forgets less; `peftc.reduce_intruders` gives their numbers.

    Intruders are those of the first `top_k` left singular vectors of `W + ΔW` whose cosines with those of `W` are all below
    `threshold_epsilon`. `mitigation_lambda` is the share of an intruder that is left. Raises `PeftcError`, with nothing changed.
    """
    from peftc import reduce_intruders

    reduce_intruders(
        peft_model,
        old_adapter_name,
        new_adapter_name,
        top_k=top_k,
        threshold=threshold_epsilon,
        scale=mitigation_lambda,
        tell=logging_sink,
    )


def create_loraplus_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """LoRA+: an optimiser of that class, in which B learns `loraplus_lr_ratio` times as fast as A.

    `loraplus_lr_embedding` is the step size of adapters of embeddings, 1e-6 if left out, and `loraplus_weight_decay` the
    decay of all but biases and norms; further keywords go to the class.
    """
    from peftc import two_rate_optimizer

    own = {"loraplus_lr_embedding": "embedding_lr", "loraplus_weight_decay": "decay"}
    given = {own.get(name, name): value for name, value in kwargs.items()}
    return two_rate_optimizer(model, optimizer_cls, lr, loraplus_lr_ratio, **given)


def create_riemannian_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """Riemannian preconditioning (arXiv:2402.02347): an optimiser of that class, for which the gradient of each factor is scaled
    by the other, `reg` being added to the diagonal of what is inverted. Further keywords go to the class. Raises `PeftcError`.
    """
    from peftc import preconditioned_optimizer

    return preconditioned_optimizer(model, optimizer_cls, lr, reg, **kwargs)


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """LoRA-FA: A is frozen, and B moves by AdamW so that `B A` follows the gradient of the full weight.

    `r`, `lora_alpha` and `use_rslora` are arguments of the reference: what counts is each layer's own scaling, and one that
    is given and differs from a config is warned of. Raises `PeftcError` for adapters of stacked experts.
    """
    from peftc import projected_optimizer

    return projected_optimizer(model, lr, weight_decay, r=r, lora_alpha=lora_alpha, use_rslora=use_rslora)
