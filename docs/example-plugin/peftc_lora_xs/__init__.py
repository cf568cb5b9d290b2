"""LoRA-XS: a trained r × r matrix between frozen factors of each weight (Bałazy et al., arXiv:2405.17604, section 3).

`W' = W + s · B R A` with `B = U_r Σ_r` and `A = V_rᵀ` from the truncated SVD of W; the paper calls the outer factors A and B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from peftc import plugin as api
from peftc.plugin import LayerFacts, PeftType, Slot, module_slot

if TYPE_CHECKING:
    from torch import Tensor


class LoraXsConfig(api.TargetsMixin, api.LayersMixin, api.RankMixin, api.ModulesToSaveMixin, api.PeftConfig):
    """Options of a LoRA-XS adapter."""

    peft_type: PeftType | None = PeftType("LORA_XS")
    alpha: float = 16.0
    """The update is multiplied by `alpha / r`."""
    init_std: float = api.Field(default=1e-5, ge=0)
    """Standard deviation of the trained matrix at the start; 0 starts exactly at the base model."""


class LoraXs(api.MapTuner[LoraXsConfig]):
    """The outer factors are saved too: an SVD made again on another device may have other signs."""

    supports = api.LINEAR_KINDS | api.CONV_KINDS | {api.Kind.EMBEDDING}

    def slots(self, c: LoraXsConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield module_slot("lora_xs_A", (c.r, layer.in_features * math.prod(layer.kernel)), trainable=False)
        yield module_slot("lora_xs_B", (layer.out_features, c.r), trainable=False)
        yield module_slot("lora_xs_R", (c.r, c.r))

    def init(self, c: LoraXsConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: api.SlotInit) -> None:
        import torch

        weight = init.base["weight"]  # (out, in · kernel), however the layer stores it
        u, s, vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        signs = vh.gather(
            1, vh.abs().argmax(dim=1, keepdim=True)
        ).sign()  # a choice of signs, so that it is always the same
        slots["lora_xs_A"].copy_((signs * vh)[: c.r])
        slots["lora_xs_B"].copy_((signs.T * u * s)[:, : c.r])
        init.normal(slots["lora_xs_R"], c.init_std)

    def scaling(self, c: LoraXsConfig, layer: LayerFacts) -> float:
        return c.alpha / c.r

    def check(self, c: LoraXsConfig, layer: LayerFacts, path: str) -> Iterable[api.Diagnostic]:
        rank = min(layer.out_features, layer.in_features * math.prod(layer.kernel))
        if layer.groups > 1 or c.r > rank:
            what = f"`{path}` is a grouped convolution" if layer.groups > 1 else f"`{path}` has {rank} singular values"
            yield api.rules.BAD_TARGET(
                what, fix=f"Leave it out with `exclude_modules`, or set `r` to {rank}.", where=path
            )

    def thin(self, a: api.View) -> tuple[Tensor, Tensor, float]:
        return a.lora_xs_R @ a.lora_xs_A, a.lora_xs_B, a.scaling


@api.hookimpl
def peftc_tuner() -> api.TunerMethod:
    return api.TunerMethod(
        "LORA_XS",
        LoraXsConfig,
        LoraXs(),
        prefix="lora_xs_",
        layer_names=("lora_xs_R",),
        summary="A trained r × r matrix between the frozen factors of each weight's SVD.",
        paper="arXiv:2405.17604",
        examples=({"r": 3}, {"r": 2, "init_std": 0.0}),
        identity_at_start=lambda c: c.init_std == 0,
    )
