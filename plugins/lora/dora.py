"""DoRA: magnitude and direction of each row of the weight apart (Liu et al., arXiv:2402.09353, equation 5).

`W' = m ∘ (W + s · B A) / ‖W + s · B A‖`, with one magnitude for each output. In backward the norm is a constant (section 4.3).
It is computed from the factors, `‖w‖² + 2 s b · (A w) + s² b · (A A^T) b`, so that no matrix of the weight's size is made.
"""

from __future__ import annotations

from dataclasses import replace

from peftc import plugin as p

from .config import LoraConfig
from .plain import LoraTuner


class DoraTuner(LoraTuner):
    """`y = m / ‖W + s · B A‖ ∘ (W x + s · B A x) + b`."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | {p.Kind.EMBEDDING}
    stacks_experts = False
    takes_groups = False
    additive = False
    bent_gradients = "the norm is a constant in backward, as it was published"
    thin = p.MapTuner.thin

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        yield from super().slots(c, layer)
        shape = (1, layer.out_features, *layer.ones) if layer.kernel else (layer.out_features,)
        yield replace(p.module_slot("lora_magnitude_vector", shape), stored_tail="")

    def settle(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        """A magnitude begins as the norm, so that the start is the base model's whatever the factors are."""
        import torch

        A, B, magnitude = slots.values()
        if magnitude.is_meta:
            return
        weight = init.base["weight"].to(A.dtype)
        updated = weight + self.scaling(c, layer) * (B.flatten(1) @ A.flatten(1))
        magnitude.copy_(torch.linalg.norm(updated, dim=1).view(magnitude.shape))

    def rescaled(self, a: p.View[LoraConfig]) -> p.Rescaled:
        A, B, scale = LoraTuner.thin(self, a)
        first, second = (
            ("lora_embedding_A", "lora_embedding_B") if a.layer.kind is p.Kind.EMBEDDING else ("lora_A", "lora_B")
        )

        def norm() -> p.Tensor:
            weight = a.base["weight"]
            own = a.kept("rows", lambda: p.row_norms(weight, A), base=("weight",))
            return p.norms_of_sum(weight, own, A.flatten(1), B.flatten(1), scale)

        kept = a.kept("norm", norm, slots=(first, second), base=("weight",))
        return A, B, scale, a.lora_magnitude_vector.reshape(-1) / kept.detach()


VARIANT = p.Variant(
    "LORA",
    "dora",
    DoraTuner(),
    chosen=lambda c: c.use_dora,
    option="use_dora",
    layer_names=("lora_magnitude_vector",),
    summary="Magnitude and direction of each output are trained apart.",
    paper="arXiv:2402.09353",
    examples=({"r": 4, "use_dora": True},),
)
