"""Optimisers for adapters of two thin factors, `B A`: one step size for each factor, both by gradients that do not depend on how
the product is divided, or B alone, along the full gradient.

Which parameters are factors is seen by the layers' slots, so that they serve every method with such a pair.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftc import rules
from peftc.diagnostics import PeftcError, warn
from peftc.graph.nodes import LINEAR_KINDS, Kind
from peftc.model.peft_model import PeftModel
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.tuner.optimizer import UP, factors

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
        elif parameter.dim() == 1 or any(part.endswith(UP) for part in name.split(".")):
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
    pairs = [pair for pair in _pairs(model) if pair.alone]
    for pair in pairs:
        pair.down.requires_grad_(False)
    paired = {id(pair.up): pair for pair in pairs}
    trained = [p for p in model.parameters() if p.requires_grad]
    return _Projected(trained, paired, lr=lr, weight_decay=weight_decay)


def preconditioned_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], lr: float, damping: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimiser of that class for which gradients of A and B are scaled in each step: `(BᵀB + δI)⁻¹ g_A` and
    `g_B (AAᵀ + δI)⁻¹`, δ being the damping (Zhang and Pilanci 2024, arXiv:2402.02347, equation 5). So a step does not depend on
    how the product is divided into the two.

    Factors of linear layers are scaled; all else that trains moves by the class as it is. A closure is evaluated once in a step.
    Raises `PeftcError` if no layer has two such factors, for adapters of stacked experts, and for a class that has to evaluate
    its closure several times.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        what = f"`optimizer_cls` is {optimizer_cls!r:.60}, not a class of `torch.optim.Optimizer`"
        raise PeftcError(rules.OPTIMIZER_UNFIT(what, fix="Give a class such as `torch.optim.AdamW`."))
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        what = f"{optimizer_cls.__name__} requires a closure, which it evaluates several times in a step"
        fix = "Use a class that needs none, such as `torch.optim.AdamW`."
        raise PeftcError(rules.OPTIMIZER_UNFIT(what, fix=fix))
    pairs = [pair for pair in _pairs(model) if pair.kind in LINEAR_KINDS and pair.trains]
    if not pairs:
        what = "The model has no layer with two trainable factors, whose gradients could be scaled"
        raise PeftcError(
            rules.NOT_ADAPTED(what, fix="Use it on a model with an adapter that trains, or use the class itself.")
        )
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **{**kwargs, "lr": lr})

    def scale(own: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        evaluate = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimiser itself
        if evaluate is not None:  # now, as what it leaves as gradients is to be scaled
            with torch.enable_grad():
                loss = evaluate()
            args, kwargs = (own, lambda: loss), {}
        with torch.no_grad():
            for pair in pairs:
                pair.scale_gradients(damping)
        return args, kwargs

    optimizer.register_step_pre_hook(scale)
    return optimizer


@dataclass(frozen=True)
class _Pair:
    """A layer's two factors, A `(r, in, ...)` and B `(out, r, ...)`, and what their product is scaled by; `alone` if the adapter has
    nothing else there."""

    down: nn.Parameter
    up: nn.Parameter
    scaling: Callable[[], float]
    alone: bool
    kind: Kind

    @property
    def trains(self) -> bool:
        return self.down.requires_grad and self.up.requires_grad

    def along(self, gradient: Tensor) -> Tensor:
        """The gradient of B that moves `s B A` nearest to the gradient of the full weight: `g (A Aᵀ)⁻¹ / s²`."""
        A = self.down.detach().flatten(1).float()
        inverse = torch.linalg.pinv(A @ A.T + 1e-8 * torch.eye(A.shape[0], device=A.device))
        found = gradient.flatten(1).float() @ inverse / self.scaling() ** 2
        return found.view(gradient.shape).to(gradient.dtype)

    def scale_gradients(self, damping: float) -> None:
        """Both gradients, in place, each by the other factor."""
        dtype = torch.promote_types(self.down.dtype, torch.float32)
        A, B = (factor.detach().to(dtype) for factor in (self.down, self.up))
        eye = damping * torch.eye(A.shape[0], device=A.device, dtype=dtype)
        of_A, of_B = self.down.grad, self.up.grad
        if of_A is not None:
            of_A.copy_(torch.linalg.pinv(B.T @ B + eye) @ of_A.to(dtype))
        if of_B is not None:
            of_B.copy_(of_B.to(dtype) @ torch.linalg.pinv(A @ A.T + eye))


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
    """The two factors of every adapter on every layer, where it has them and they train."""
    for layer in _layers(model):
        for adapter in layer.adapters:
            site = layer.site(adapter)
            slots = factors(site.slots)
            if slots is None:
                continue
            if site.layer.experts:
                what = f"`{site.path}` has factors of {site.layer.experts} experts, whose gradients cannot be projected together"
                raise PeftcError(rules.BAD_TARGET(what, fix="Use another optimiser.", where=site.path))
            found = [container[key] for container, key in (layer.where(adapter, slot) for slot in slots)]
            scaling = partial(_scaling, layer, adapter)
            first, second = found
            yield _Pair(first, second, scaling, len(site.slots) == len(slots), site.layer.kind)


def _scaling(layer: TunerLayer, adapter: str) -> float:
    return layer.scaling[adapter]


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
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
