"""Methods made for these tests whose layers share tensors, and derive some; and models that they are on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftc import plugin as api


class CommonConfig(api.TargetsMixin, api.PeftConfig):
    """Options of the common update."""

    peft_type: api.PeftType | None = api.PeftType("COMMON")
    r: int = 2
    seed: int = 0
    saves: bool = True
    bad: bool = False


class CommonTuner(api.MapTuner[CommonConfig]):
    """`y = W x + B diag(d) A x`: A derived, and B trained, as large as the largest layer needs, the same for all layers."""

    supports = api.LINEAR_KINDS

    def slots(self, c: CommonConfig, layer: api.LayerFacts) -> Iterable[api.Slot]:
        return self.declare([(c, layer)])[0]

    def declare(self, kinds: Sequence[tuple[CommonConfig, api.LayerFacts]]) -> Sequence[Iterable[api.Slot]]:
        c, inputs = kinds[0][0], max(layer.in_features for _, layer in kinds)
        outputs = max(layer.out_features for _, layer in kinds)
        own = api.parameter_slot("common_d", (c.r,))
        bank = api.parameter_slot("common_B", (outputs, c.r), share=api.Share.MODEL)
        return [
            (own, bank, api.derived_slot("common_A", (c.r, inputs), saved=c.saves, share=api.Share.MODEL))
            for _ in kinds
        ]

    def init(self, c: CommonConfig, layer: api.LayerFacts, slots: Mapping[str, Tensor], init: api.SlotInit) -> None:
        for tensor in slots.values():
            init.normal(tensor)

    def derive(self, c: CommonConfig, layer: api.LayerFacts, slots: Mapping[str, api.Slot]) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(c.seed)
        shape = (1,) if c.bad else slots["common_A"].shape
        return {"common_A": torch.randn(shape, generator=generator)}

    def thin(self, a: api.View) -> tuple[Tensor, Tensor, float]:
        A, B = a.common_A[:, : a.layer.in_features], a.common_B[: a.layer.out_features]
        return a.common_d[:, None] * A, B, 1.0


class TwinConfig(api.TargetsMixin, api.PeftConfig):
    """Options of the shift of tied rows."""

    peft_type: api.PeftType | None = api.PeftType("TWIN")
    share: str = api.Share.WEIGHT


class TwinTuner(api.MapTuner[TwinConfig]):
    """`W' = W + delta 1^T` on the vocabulary's side: one delta wherever the weight is one."""

    supports = frozenset({api.Kind.EMBEDDING, api.Kind.LINEAR})

    def slots(self, c: TwinConfig, layer: api.LayerFacts) -> Iterable[api.Slot]:
        yield api.Slot("twin_delta", (layer.weight.shape if layer.weight else ())[:1], share=c.share)

    def init(self, c: TwinConfig, layer: api.LayerFacts, slots: Mapping[str, Tensor], init: api.SlotInit) -> None:
        for tensor in slots.values():
            init.normal(tensor)

    def params(self, a: api.View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        rows = a.twin_delta if a.layer.kind is api.Kind.EMBEDDING else a.twin_delta[:, None]
        return {**p, "weight": p["weight"] + rows}


METHODS = (
    api.TunerMethod(
        "COMMON", CommonConfig, CommonTuner(), prefix="common_", layer_names=("common_d", "common_B"), alike=("seed",)
    ),
    api.TunerMethod("TWIN", TwinConfig, TwinTuner(), prefix="twin_", layer_names=("twin_delta",)),
)


class Tied(nn.Module):
    """A table that is also the head; ids `(n,)` to `(n, vocabulary)`."""

    def __init__(self, is_tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.table(ids)))
        return out


def common(**options: Any) -> CommonConfig:
    return CommonConfig(**{"target_modules": ["first", "second"], **options})


def twin(**options: Any) -> TwinConfig:
    return TwinConfig(**{"target_modules": ["table", "head"], **options})
