"""LoRA-GA: the first step of the adapter goes where one of the whole weight would (Wang et al., arXiv:2407.05000).

A and B are singular vectors of the weight's gradient on sample data, different ones of the 2 r strongest; what they add is taken
out of the base.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from peftc import plugin as p

from .decomposed import lowrank

#: Steps of subspace iteration, and how many components are looked for beside those that are used, in ranks.
STEPS, WIDTH = 4, 4


class LoraGAConfig(p.ConfigModel):
    """How the singular vectors are used (`lora_ga_config`)."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Which of them go to A and which to B: every other one, the second r to A and the first to B, the other way round, or
    the same random ones to both."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """How large they are: by the width of the layer, by the weight's largest singular value, by the scaling, or as they
    are."""
    stable_gamma: int = p.Field(default=16, ge=1)
    """What `stable` divides by."""


class LoraGA(p.Start):
    """A of right, B of left singular vectors of the gradient."""

    name: ClassVar[str] = "lora_ga"
    summary: ClassVar[str] = "Singular vectors of the weight's gradient on sample data, taken out of the base."
    paper: ClassVar[str] = "arXiv:2407.05000"
    spares_others: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    within_rank: ClassVar[bool] = True
    reads: ClassVar[p.Reads] = p.Reads.GRADIENTS
    helper: ClassVar[str] = "preprocess_loraga"
    options: ClassVar[str] = "lora_ga_config"

    def factors(self, s: p.StartView) -> p.Begun:
        import torch

        how, gradient = _config(s.config), s.data["gradient"].to(s.weight)
        left, values, right = lowrank(s, gradient, min(WIDTH * s.rank, *gradient.shape), STEPS)
        ofA, ofB = _chosen(s, how.direction)
        A, B = right[:, ofA].t(), left[:, ofB] * values[ofB]
        if how.scale == "stable":
            B = B * (s.weight.shape[0] ** 0.25 / how.stable_gamma**0.5)
        elif how.scale == "weight_svd":
            largest = lowrank(s, s.weight, s.rank, STEPS)[1][0]
            first = values[ofB][0]
            B = B * (largest / first) if first > 0 else B
        elif how.scale == "gd_scale":
            A, B = A / s.scaling, B / s.scaling
        stored = getattr(torch, s.layer.params["weight"].dtype)  # what is taken out is what is added, to the last bit
        return p.Begun(A.to(stored).to(A.dtype).contiguous(), B.to(stored).to(B.dtype).contiguous())

    def prepare(self, model: p.nn.Module, c: p.PeftConfig, batches: Sequence[p.Tensors]) -> p.PeftConfig:
        def step() -> None:
            for batch in batches:
                model(**batch).loss.backward()

        preprocess_loraga(model, c, step)
        return c

    def check_layer(self, c: p.PeftConfig, layer: p.LayerFacts, rank: int, path: str) -> p.Problems:
        """Twice as many singular vectors as ranks are used."""
        if 2 * rank > layer.rank:
            what = f"`lora_ga` uses {2 * rank} singular vectors for the rank {rank}, and `{path}` has {layer.rank}"
            yield p.rules.START_UNFIT(what, fix=f"Set the rank to at most {layer.rank // 2} there.", where=path)


def _config(c: p.PeftConfig) -> LoraGAConfig:
    return getattr(c, "lora_ga_config", None) or LoraGAConfig()


def _chosen(s: p.StartView, direction: str) -> tuple[p.Tensor, p.Tensor]:
    """Which singular vectors are for A, and which for B."""
    import torch

    order = torch.arange(2 * s.rank, device=s.weight.device)
    if direction == "ArBr":
        return order[1::2], order[0::2]
    if direction == "A2rBr":
        return order[s.rank :], order[: s.rank]
    if direction == "ArB2r":
        return order[: s.rank], order[s.rank :]
    own = s.permutation(2 * s.rank)[: s.rank]
    return own, own


def preprocess_loraga(
    model: p.nn.Module,
    lora_config: p.PeftConfig,
    train_step: Callable[[], None],
    cache_file: str | None = None,
) -> None:
    """Find the gradients that an adapter with these options begins with, before it is put on the model.

    `train_step` runs forward and backward on sample data, once or several times: gradients are averaged over the calls of each
    layer. `cache_file` is read if it is there, else written. What requires gradients, and the gradients that were there, are as
    before. Raises `PeftcError`: no gradient came, or a layer's weight has none to give.
    """
    import torch

    targets = p.start_targets(model, lora_config)
    if cache_file is not None and os.path.exists(cache_file) and os.path.getsize(cache_file):
        found = torch.load(cache_file, map_location="cpu", weights_only=True)
        gradients = {path: found[f"{path}._peft_loraga_grad"] for path in targets}
    else:
        gradients = _gradients(model, {path: target.module for path, target in targets.items()}, train_step)
        if cache_file is not None:
            os.makedirs(os.path.dirname(os.path.abspath(cache_file)), exist_ok=True)
            torch.save({f"{path}._peft_loraga_grad": tensor for path, tensor in gradients.items()}, cache_file)
    for path, target in targets.items():
        target.gather(gradient=target.logical(gradients[path]))


def _gradients(model: p.nn.Module, modules: dict[str, Any], train_step: Callable[[], None]) -> dict[str, p.Tensor]:
    """Of each layer the mean gradient of its weight, in the order in which that is stored."""
    import torch

    was, training = {own: (own.requires_grad, own.grad) for own in model.parameters()}, model.training
    counts = dict.fromkeys(modules, 0)

    def counting(path: str) -> Callable[..., None]:
        def count(gradient: p.Tensor) -> None:
            counts[path] += 1

        def see(module: p.nn.Module, args: object, output: p.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(count)  # type: ignore[no-untyped-call]  # in torch

        return see

    handles = [module.register_forward_hook(counting(path)) for path, module in modules.items()]
    try:
        for own in was:
            own.requires_grad_(False)
        for module in modules.values():
            module.weight.grad = None
            module.weight.requires_grad_(True)
        model.train()
        with torch.enable_grad():
            train_step()
        found = {path: module.weight.grad for path, module in modules.items()}
    finally:
        for handle in handles:
            handle.remove()
        for own, (required, gradient) in was.items():
            own.requires_grad_(required)
            own.grad = gradient
        model.train(training)
    lacking = [path for path, gradient in found.items() if not isinstance(gradient, torch.Tensor)]
    if lacking:
        what = f"`train_step` gave `{lacking[0]}` no gradient, and {len(lacking) - 1} more layers"
        fix = "Call `backward()` in it, on the output of the model that was given."
        raise p.PeftcError(p.rules.START_DATA(what, fix=fix, where=lacking[0]))
    return {path: gradient.detach() / max(counts[path], 1) for path, gradient in found.items() if gradient is not None}


peftc_start = p.starting(LoraGA())
