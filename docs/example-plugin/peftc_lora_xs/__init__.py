"""LoRA-XS: a trained r × r matrix between the frozen factors of each weight's SVD (Bałazy et al., arXiv:2405.17604, section 3).

`W' = W + s · B R A` with `B = U_r Σ_r` and `A = V_rᵀ` from the truncated SVD of W; the paper calls the outer factors A and B.
"""

from __future__ import annotations

from peftc import plugin as p


class LoraXsConfig(p.RankMixin, p.LayersConfig):
    """Options of a LoRA-XS adapter."""

    peft_type: p.PeftType | None = p.PeftType("LORA_XS")
    alpha: float = 16.0
    """The update is multiplied by `alpha / r`."""
    init_std: float = p.Field(default=1e-5, ge=0)
    """Standard deviation of the trained matrix at the start; 0 starts exactly at the base model."""


class LoraXs(p.MapTuner[LoraXsConfig]):
    """The outer factors are saved too: an SVD made again on another device may have other signs."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | {p.Kind.EMBEDDING}
    takes_groups = False
    rank_limit = p.RankLimit(is_hard=True)

    def slots(self, c: LoraXsConfig, layer: p.LayerFacts) -> p.Slots:
        yield p.module_slot("lora_xs_A", (c.r, layer.fan_in), trainable=False)
        yield p.module_slot("lora_xs_B", (layer.out_features, c.r), trainable=False)
        yield p.module_slot("lora_xs_R", (c.r, c.r))

    def init(self, c: LoraXsConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        import torch

        weight = p.widened(init.base["weight"])  # (out, in · kernel), however the layer stores it
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        largest = vh.abs().argmax(dim=1, keepdim=True)
        signs = vh.gather(1, largest).sign()  # a choice of signs, so that it is always the same
        slots["lora_xs_A"].copy_((signs * vh)[: c.r])
        slots["lora_xs_B"].copy_((signs.T * u * s)[:, : c.r])
        init.normal(slots["lora_xs_R"], c.init_std)

    def scaling(self, c: LoraXsConfig, layer: p.LayerFacts) -> float:
        return c.alpha / c.r

    def thin(self, a: p.View[LoraXsConfig]) -> p.Factors:
        return a.lora_xs_R @ a.lora_xs_A, a.lora_xs_B, a.scaling


peftc_tuner = p.method(
    LoraXsConfig,
    LoraXs(),
    prefix="lora_xs_",
    layer_names=("lora_xs_R",),
    examples=({"r": 3}, {"r": 2, "init_std": 0.0}),
    identity_at_start=lambda c: c.init_std == 0,
)
