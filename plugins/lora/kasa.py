"""KaSA: the base loses its weakest components, and the update has singular values of its own (Wang et al., arXiv:2412.06071).

`y = W' x + s · B diag(d) A x`, where W' is W without its r smallest singular components (section 3.2), and d `(r,)` is trained.
The loss has two terms more: `beta ‖d‖²`, and `gamma` times how far A and B are from orthonormal (equations 9 to 12).

That the base loses them is part of the adapter, and no way to begin: a loaded one needs it as a fresh one does. So the variant
brings the change along (`Variant.start`), and the core has it in place while such an adapter acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc import plugin as p

from .config import LoraConfig
from .plain import LoraTuner

#: Noted by a layer once the model's own loss has the terms of its last call.
_ADDED = "added"


class Truncation(p.Start):
    """`W - s · B A`, where these are the r smallest components `U S V` of W. Two adapters drop no more than the larger does."""

    name: ClassVar[str] = "kasa"
    paper: ClassVar[str] = "arXiv:2412.06071"
    changes_base: ClassVar[bool] = True
    nests: ClassVar[bool] = True
    within_rank: ClassVar[bool] = True

    def factors(self, s: p.StartView) -> p.Begun:
        import torch

        left, values, rows = torch.linalg.svd(s.weight, full_matrices=False)
        smallest = slice(len(values) - s.rank, None)
        kept = {"A": rows[smallest].contiguous(), "B": (left[:, smallest] * values[smallest] / s.scaling).contiguous()}
        return p.Begun(None, None, kept)


class KasaTuner(LoraTuner):
    """With one number more for each rank."""

    supports = p.LINEAR_KINDS
    stacks_experts = False
    of_rank = p.MapTuner.of_rank

    def check(self, c: LoraConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        if c.r == layer.rank:
            what = f"`kasa_config` with the rank {c.r} leaves nothing of the weight of `{path}`"
            why = "It drops as many components as the rank, and the weight has no more."
            yield p.rules.BAD_TARGET(what, why=why, fix=f"Set the rank to less than {c.r} there.", where=path)

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        yield from super().slots(c, layer)
        if c.kasa_config is not None:
            yield p.parameter_slot("lora_diag", (c.r,))

    def init(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        super().init(c, layer, slots, init)
        init.normal(slots["lora_diag"])

    def of_twice(self, c: LoraConfig) -> LoraConfig:
        """One without components of its own, which stands beside the whole base."""
        return super().of_twice(c).model_copy(update={"kasa_config": None})

    def thin(self, a: p.View[LoraConfig]) -> p.Factors:
        if a.training:
            a.noted.pop(_ADDED, None)
        return a.lora_A * a.lora_diag.unsqueeze(1), a.lora_B, a.scaling

    def loss(self, c: LoraConfig, sites: Mapping[str, p.View[LoraConfig]], outputs: Any) -> p.Tensor | None:
        """The sum over layers. Who asks after the model's own loss has had it gets nothing, until the next call in training."""
        assert c.kasa_config is not None
        terms = []
        for a in sites.values():
            if outputs is None and _ADDED in a.noted:
                continue
            A, B, values = a.lora_A.float(), a.lora_B.float(), a.lora_diag.float()
            far = _far(A @ A.T) + _far(B.T @ B)
            terms.append(c.kasa_config.beta * values.square().sum() + c.kasa_config.gamma * far)
            if outputs is not None:
                a.noted[_ADDED] = True
        return sum(terms[1:], terms[0]) if terms else None


def _far(products: p.Tensor) -> p.Tensor:
    """The distance `(r, r)` of products of vectors from those of orthonormal ones."""
    import torch

    distance: p.Tensor = torch.linalg.norm(products - torch.eye(len(products), device=products.device))
    return distance


def get_kasa_loss(self: Any, adapter_names: str | list[str] | None = None) -> p.Tensor | float:
    """What is still to be added to a loss for adapters, the active ones if none are named: nothing where the model has
    computed its loss itself, which has it."""
    found: p.Tensor | float = self.added_loss(adapter_names)
    return found


VARIANT = p.Variant(
    "LORA",
    "kasa",
    KasaTuner(),
    chosen=lambda c: c.kasa_config is not None,
    option="kasa_config",
    start=Truncation(),
    layer_names=("lora_diag",),
    summary="The base loses weak components, the update has its own.",
    paper="arXiv:2412.06071",
    examples=({"r": 2, "kasa_config": {"beta": 1e-2, "gamma": 1e-2}},),
)
