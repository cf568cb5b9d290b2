"""HiRA: `W' = W + W0 ∘ (B A)`, the pristine weight times a low-rank matrix, entry by entry (Huang et al., ICLR 2025).

The update has a high rank although its factors are thin. It is folded into the weight of linear layers and convolutions,
which then run once; backward folds again. Embeddings are changed for the ids at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from peftc.plugin import (
    CONV_KINDS,
    EXPERT_KINDS,
    LINEAR_KINDS,
    Diagnostic,
    ExpertsMixin,
    Field,
    Kind,
    LayerFacts,
    LayersMixin,
    MapTuner,
    ModulesToSaveMixin,
    PeftConfig,
    PeftType,
    RankMixin,
    Slot,
    SlotInit,
    TargetsMixin,
    TunerMethod,
    View,
    hookimpl,
    parameter_slot,
    rules,
)

if TYPE_CHECKING:
    from torch import Tensor


class HiraConfig(TargetsMixin, ExpertsMixin, LayersMixin, RankMixin, ModulesToSaveMixin, PeftConfig):
    """Options of a HiRA adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("HIRA")
    r: int = Field(default=32, ge=1)
    """Rank of the factors; the update itself can have any rank."""
    hira_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping inputs of the update in training; embeddings have none to drop."""
    fan_in_fan_out: bool = False
    """Whether the adapted layers store their weight as (in, out); set by itself where they do."""
    init_weights: bool | Literal["gaussian"] | None = True
    """How A starts (B is zero): `true` uniform, `gaussian` normal; `false` starts both at random."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some modules: pattern over the end of the path -> `r`."""

    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}


class Folded(MapTuner[HiraConfig]):
    """`y = (W + s · W0 ∘ (B A)) x`."""

    supports = LINEAR_KINDS | CONV_KINDS | EXPERT_KINDS

    def slots(self, c: HiraConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("hira_A", (c.r, layer.in_features // layer.groups, *layer.kernel))
        yield parameter_slot("hira_B", (layer.out_features, c.r, *(1 for _ in layer.kernel)))

    def init(self, c: HiraConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        first, second = slots["hira_A"], slots["hira_B"]
        init.normal(first)
        init.normal(second)
        if not c.init_weights:
            return
        if c.init_weights == "gaussian":
            init.normal(first, std=1 / c.r)
        else:
            init.kaiming_uniform(first, math.sqrt(5))
        init.zeros(second)

    def dropout(self, c: HiraConfig) -> float:
        return c.hira_dropout

    def check(self, c: HiraConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        limit = min(layer.in_features // layer.groups * math.prod(layer.kernel), layer.out_features)
        if c.r > limit:
            yield rules.RANK_BEYOND_LAYER(
                f"Rank {c.r} is beyond what the factors of `{path}` can have ({limit})",
                fix=f"Set `r`, or a `rank_pattern` for it, to at most {limit}.",
                where=path,
            )

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        A, B = self.factors(a)
        return {**p, "weight": p["weight"].addcmul(p0["weight"], (B * a.scaling) @ A)}

    def factors(self, a: View) -> tuple[Tensor, Tensor]:
        """A `(r, in · kernel)` and B `(out, r)`."""
        return a.hira_A.flatten(1), a.hira_B.flatten(1)


class Lookup(Folded):
    """For embeddings: `(W0 ∘ (B A))` in the columns of the ids at hand."""

    supports = frozenset({Kind.EMBEDDING})

    def slots(self, c: HiraConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("hira_embedding_A", (c.r, layer.in_features))
        yield parameter_slot("hira_embedding_B", (layer.out_features, c.r))

    def init(self, c: HiraConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        first, second = slots["hira_embedding_A"], slots["hira_embedding_B"]
        init.normal(first)
        init.normal(second)
        if c.init_weights:
            init.zeros(first)
            init.normal(second)

    def factors(self, a: View) -> tuple[Tensor, Tensor]:
        return a.hira_embedding_A, a.hira_embedding_B

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        from torch.nn.functional import embedding

        A, B = self.factors(a)
        weight = a.base["weight"]
        return embedding(x, weight.t()).to(B.dtype) * (embedding(x, A.t()) @ (B * a.scaling).t())


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "HIRA",
        HiraConfig,
        (Folded(), Lookup()),
        prefix="hira_",
        layer_names=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        layer_options={"r": "r"},
        layer_dropout="hira_dropout",
        model_class="HiraModel",
        layer_class="HiraLayer",
        default_targets={"target_modules": "hira"},
        summary="The frozen weight is multiplied, entry by entry, by a low-rank matrix.",
        paper="https://openreview.net/forum?id=TwJrTz9cRS",
        tags=("hira",),
        examples=({"r": 4}, {"r": 3, "init_weights": False}, {"r": 4, "init_weights": "gaussian"}),
        identity_at_start=lambda c: bool(c.init_weights),
    )
