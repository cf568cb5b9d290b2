"""VeLoRA: of the input of A, backward keeps one number for each group of features (Miles et al., arXiv:2405.17991).

`y = W x + s · B A x` as ever; the gradient of A is that of inputs of which each group is projected on one direction.
"""

from __future__ import annotations

from peftc import plugin as p

from .config import LoraConfig
from .nested import VeloraConfig
from .plain import LoraTuner


class VeloraTuner(LoraTuner):
    """The direction is a tensor that is not trained, and follows the batches in training."""

    supports = p.LINEAR_KINDS
    stacks_experts = False
    bent_gradients = "that of A is of inputs that are compressed, as it was published"
    thin = p.MapTuner.thin
    of_rank = p.MapTuner.of_rank

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        yield from super().slots(c, layer)
        yield p.derived_slot("lora_velora_embed", (_size(c, layer),), saved=True)

    def init(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        super().init(c, layer, slots, init)
        if _options(c).init_type == "random":  # the reference draws it, and what follows is as after that
            init.skip_normal(slots["lora_A"].new_empty(_size(c, layer)))

    def derive(self, c: LoraConfig, layer: p.LayerFacts, slots: p.LabelledSlots) -> p.Tensors:
        """Zero until the first batch; a random direction from a seed."""
        import torch

        size = _size(c, layer)
        if _options(c).init_type != "random":
            return {"lora_velora_embed": torch.zeros(size)}
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(0))
        return {"lora_velora_embed": drawn / drawn.norm()}

    def branch(self, a: p.View[LoraConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        import torch

        own = _options(a.config)
        if not (a.training and torch.is_grad_enabled()):
            return a.up(a.lora_B, a.down(a.lora_A, x)) * a.scaling
        direction = a.lora_velora_embed
        if own.init_type == "batch_average" or (own.init_type == "batch_average_once" and not direction.any()):
            with torch.no_grad():
                direction.copy_(p.mean_direction(x, own.num_groups))
        h = p.linear_compressed(x, a.lora_A, direction.clone(), own.num_groups, own.scale)
        return a.up(a.lora_B, h) * a.scaling

    def params(self, a: p.View[LoraConfig], w: p.Tensors, w0: p.Tensors) -> p.Tensors:
        return {**w, "weight": w["weight"] + a.scaling * (a.lora_B @ a.lora_A)}


def _options(c: LoraConfig) -> VeloraConfig:
    assert c.velora_config is not None
    return c.velora_config


def _size(c: LoraConfig, layer: p.LayerFacts) -> int:
    """Features of a group."""
    return max(1, -(-layer.in_features // _options(c).num_groups))


VARIANT = p.Variant(
    "LORA",
    "velora",
    VeloraTuner(),
    chosen=lambda c: c.velora_config is not None,
    option="velora_config",
    summary="Backward keeps compressed inputs.",
    paper="arXiv:2405.17991",
    examples=({"r": 4, "velora_config": {"num_groups": 4}}, {"r": 4, "velora_config": {"init_type": "random"}}),
)
