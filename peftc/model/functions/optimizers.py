"""Optimisers for adapters of two thin factors, `B A`: one step size for each factor, or B alone, along the full gradient.

Which parameters are factors is seen by the layers' slots, so that they serve every method with such a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftc import rules
from peftc.diagnostics import PeftcError, warn
from peftc.graph.nodes import Kind
from peftc.model.peft_model import PeftModel
from peftc.runtime.layer.wrapper import TunerLayer

#: how names of slots end: A reads the input, B writes the output
_DOWN, _UP = "_A", "_B"
#: classes of bitsandbytes that keep their state in 8 bits, which embeddings are not to be trained with
_IN_8_BITS = frozenset({"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"})


def two_rate_optimizer(
    model: PeftModel,
    optimizer_cls: type[Optimizer],
    lr: float,
    ratio: float,
    embedding_lr: float = 1e-6,
    decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser of that class in which B learns `ratio` times as fast as A (Hayou et al. 2024).

    `embedding_lr` is the step size of adapters of embeddings, `decay` that of the weights of all but biases and norms;
    further keywords go to the class. Groups: A, embeddings, B, and what has no decay.
    """
    embedded = {id(p) for layer in _layers(model, Kind.EMBEDDING) for p in layer.parameters()}
    plain = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("A", "embedding", "B", "plain")}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embedded:
            groups["embedding"].append(parameter)
        elif parameter.dim() == 1 or any(part.endswith(_UP) for part in name.split(".")):
            groups["plain" if "bias" in name or id(parameter) in plain else "B"].append(parameter)
        else:
            groups["A"].append(parameter)
    fast = lr * ratio
    rates = {"A": lr, "embedding": embedding_lr, "B": fast, "plain": fast}
    given = [
        {"params": groups[name], "weight_decay": 0.0 if name == "plain" else decay, "lr": rate}
        for name, rate in rates.items()
    ]
    if optimizer_cls.__name__ in _IN_8_BITS:
        _keep_embeddings_whole(model)
    return optimizer_cls(given, **{**kwargs, "lr": lr})


def projected_optimizer(model: PeftModel, lr: float, weight_decay: float = 0.0, **told: Any) -> Optimizer:
    """A is frozen, and B moves by AdamW so that `B A` follows the gradient of the full weight (Zhang et al. 2023).

    What counts is each layer's own scaling: an option in `told` that is other than a config's is warned of. Raises
    `PeftcError` for adapters of stacked experts.
    """
    _tell_ignored(model, told)
    pairs = list(_pairs(model))
    for pair in pairs:
        pair.down.requires_grad_(False)
    paired = {id(pair.up): pair for pair in pairs}
    trained = [p for p in model.parameters() if p.requires_grad]
    return _Projected(trained, paired, lr=lr, weight_decay=weight_decay)


@dataclass(frozen=True)
class _Pair:
    """A layer's two factors, A `(r, in, ...)` and B `(out, r, ...)`, and what their product is scaled by."""

    down: nn.Parameter
    up: nn.Parameter
    scaling: Callable[[], float]

    def along(self, gradient: Tensor) -> Tensor:
        """The gradient of B that moves `s B A` nearest to the gradient of the full weight: `g (A Aᵀ)⁻¹ / s²`."""
        A = self.down.detach().flatten(1).float()
        inverse = torch.linalg.pinv(A @ A.T + 1e-8 * torch.eye(A.shape[0], device=A.device))
        found = gradient.flatten(1).float() @ inverse / self.scaling() ** 2
        return found.view(gradient.shape).to(gradient.dtype)


class _Projected(Optimizer):
    """AdamW, as transformers had it: the decay after the step; gradients of B are projected first."""

    def __init__(
        self, params: Iterable[nn.Parameter], pairs: Mapping[int, _Pair], lr: float, weight_decay: float
    ) -> None:
        self._pairs = pairs
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the loss, if a closure is given that computes it anew."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    pair = self._pairs.get(id(parameter))
                    gradient = parameter.grad if pair is None else pair.along(parameter.grad)
                    self._move(parameter, gradient, group)
        return loss

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = group["lr"] * math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(state["mean"], state["square"].sqrt().add_(group["eps"]), value=-size)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _layers(model: nn.Module, kind: Kind | None = None) -> Iterator[TunerLayer]:
    """The wrapped layers, or those round a base layer of one kind."""
    for module in model.modules():
        if isinstance(module, TunerLayer) and (kind is None or vars(module)["_kind"] is kind):
            yield module


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    """The two factors of every adapter on every layer, where it has two and no more."""
    for layer in _layers(model):
        for adapter in layer.adapters:
            site = layer.site(adapter)
            slots = {slot.name[-2:]: slot for slot in site.slots if slot.trainable}
            if set(slots) != {_DOWN, _UP} or len(site.slots) != len(slots):
                continue
            if site.layer.experts:
                what = f"`{site.path}` has factors of {site.layer.experts} experts, whose gradients cannot be projected together"
                raise PeftcError(rules.BAD_TARGET(what, fix="Use another optimiser.", where=site.path))
            found = [container[key] for container, key in (layer.where(adapter, slots[end]) for end in (_DOWN, _UP))]
            yield _Pair(*found, scaling=lambda layer=layer, adapter=adapter: layer.scaling[adapter])  # type: ignore[misc]


def _tell_ignored(model: PeftModel, given: Mapping[str, Any]) -> None:
    """Warn of arguments that say other than the configs of the active adapters."""
    for option, value in given.items():
        for name in model.active_adapters:
            own = getattr(model.peft_config[name], option, value)
            if value is not None and own != value:
                what = f"`{option}={value}` is not followed: `{name}` was made with {own}"
                warn([rules.WITHOUT_EFFECT(what, fix="Give the config's, or leave it out where it may be.")])


def _keep_embeddings_whole(model: nn.Module) -> None:
    """Have bitsandbytes keep the optimiser's state of embeddings in 32 bits."""
    import bitsandbytes  # type: ignore[import-not-found]

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
