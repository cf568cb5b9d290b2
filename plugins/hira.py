"""HiRA: the frozen weight is multiplied, entry by entry, by a low-rank matrix (Huang et al., ICLR 2025,
https://openreview.net/forum?id=TwJrTz9cRS).

`W' = W + W0 ∘ (B A)` has a high rank although its factors are thin. It is folded into the weight of linear layers and
convolutions, which then run once; backward folds again. Embeddings are changed for the ids at hand.
"""

from __future__ import annotations

from peftc import plugin as p


class HiraConfig(p.ExpertsMixin, p.RankPatternMixin, p.OrientationMixin, p.LayersConfig):
    """Options of a HiRA adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("HIRA")
    r: p.Count = 32
    """Rank of the factors; the update itself can have any rank."""
    hira_dropout: p.Dropout = 0.0
    """Probability of dropping inputs of the update in training; embeddings have none to drop."""
    init_weights: bool | str | None = True
    """How A starts (B is zero): `true` uniform, `gaussian` normal; `false` starts both at random; or the name of a start that leaves
    the base as it is, such as `orthogonal`."""


class Folded(p.MapTuner[HiraConfig]):
    """`y = (W + s · W0 ∘ (B A)) x`."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | p.EXPERT_KINDS
    dropout_option = "hira_dropout"
    rank_limit = p.RankLimit()

    def slots(self, c: HiraConfig, layer: p.LayerFacts) -> p.Slots:
        yield p.parameter_slot("hira_A", (c.r, layer.in_features // layer.groups, *layer.kernel))
        yield p.parameter_slot("hira_B", (layer.out_features, c.r, *layer.ones))

    def init(self, c: HiraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        first, second = slots["hira_A"], slots["hira_B"]
        init.normal(first)
        init.normal(second)
        if c.init_weights == "gaussian":
            init.normal(first, std=1 / c.r)
        elif c.init_weights:
            init.kaiming_uniform(first)
        if c.init_weights:
            init.zeros(second)

    def of_thin(self, c: HiraConfig, layer: p.LayerFacts, A: p.Tensor, B: p.Tensor) -> p.Tensors:
        first, second = self.slots(c, layer)
        return {first.name: A.reshape(first.shape), second.name: B.reshape(second.shape)}

    def of_rank(self, c: HiraConfig, rank: int) -> HiraConfig:
        return c.model_copy(update={"r": rank, "rank_pattern": {}})

    def combine(self, c: HiraConfig, slots: p.TensorLists, weights: p.Weights) -> p.Tensors:
        """Exact: `Σ w_i W0 ∘ (B_i A_i) = W0 ∘ ([B_1 B_2 …] [w_1 A_1; w_2 A_2; …])`."""
        from torch import cat

        first, second = slots
        weighted = [A * weight for A, weight in zip(slots[first], weights, strict=True)]
        return {first: cat(weighted), second: cat(list(slots[second]), dim=1)}

    def params(self, a: p.View[HiraConfig], w: p.Tensors, w0: p.Tensors) -> p.Tensors:
        A, B = self.factors(a)
        return {**w, "weight": w["weight"].addcmul(w0["weight"], (B * a.scaling) @ A)}

    def factors(self, a: p.View[HiraConfig]) -> tuple[p.Tensor, p.Tensor]:
        """A `(r, in · kernel)` and B `(out, r)`."""
        return a.hira_A.flatten(1), a.hira_B.flatten(1)


class Lookup(Folded):
    """For embeddings: `(W0 ∘ (B A))` in the columns of the ids at hand."""

    supports = frozenset({p.Kind.EMBEDDING})

    def slots(self, c: HiraConfig, layer: p.LayerFacts) -> p.Slots:
        yield p.parameter_slot("hira_embedding_A", (c.r, layer.in_features))
        yield p.parameter_slot("hira_embedding_B", (layer.out_features, c.r))

    def init(self, c: HiraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        first, second = slots["hira_embedding_A"], slots["hira_embedding_B"]
        init.normal(first)
        init.normal(second)
        if c.init_weights:
            init.zeros(first)
            init.normal(second)

    def of_thin(self, c: HiraConfig, layer: p.LayerFacts, A: p.Tensor, B: p.Tensor) -> p.Tensors:
        return {"hira_embedding_A": A, "hira_embedding_B": B}

    def factors(self, a: p.View[HiraConfig]) -> tuple[p.Tensor, p.Tensor]:
        return a.hira_embedding_A, a.hira_embedding_B

    def branch(self, a: p.View[HiraConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        A, B = self.factors(a)
        return p.columns(a.base["weight"], x).to(B.dtype) * (p.columns(A, x) @ (B * a.scaling).t())


peftc_tuner = p.method(
    HiraConfig,
    (Folded(), Lookup()),
    prefix="hira_",
    layer_names=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    layer_options=("r",),
    tags=("hira",),
    examples=({"r": 4}, {"r": 3, "init_weights": False}, {"r": 4, "init_weights": "gaussian"}),
    start_option="init_weights",
    own_starts=("gaussian",),
    identity_at_start=lambda c: bool(c.init_weights),
)
