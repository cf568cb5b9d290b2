"""The low-rank update as it was published: what `A` and `B` are on each kind of layer, and what they do there.

Hu et al., arXiv:2106.09685, equation 3. Every variant begins from this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from peftc import plugin as p

from .config import LoraConfig


class LoraTuner(p.MapTuner[LoraConfig]):
    """`y = W x + s · B (A x)`."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | p.EXPERT_KINDS | {p.Kind.EMBEDDING}
    stacks_experts = True
    dropout_option = "lora_dropout"
    rank_limit = p.RankLimit(most=lambda layer: min(layer.groups**2 * layer.fan_in, layer.out_features))

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        if layer.kind is p.Kind.EMBEDDING:
            yield p.parameter_slot("lora_embedding_A", (c.r, layer.in_features))
            yield p.parameter_slot("lora_embedding_B", (layer.out_features, c.r))
        elif layer.experts:
            yield p.module_slot("lora_A", (c.r * layer.experts, layer.in_features))
            yield p.module_slot("lora_B", (layer.out_features, c.r * layer.experts))
        else:
            first = p.module_slot("lora_A", (c.r, layer.in_features, *layer.kernel))
            yield replace(first, blocks=layer.groups)
            yield p.module_slot("lora_B", (layer.out_features, max(1, c.r // layer.groups), *layer.ones))

    def init(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        first, second, *_ = slots.values()
        embeds = layer.kind is p.Kind.EMBEDDING
        if c.init_lora_weights is False:
            for factor in (first, second):
                init.normal(factor) if embeds else init.kaiming_uniform(factor)
            return
        self._skip(layer, (first, second), init)
        if embeds:
            init.zeros(first)
            init.normal(second)
            return
        if c.init_lora_weights == "gaussian":
            init.normal(first, std=1 / c.r)
        else:
            init.kaiming_uniform(first)
        init.zeros(second)

    @staticmethod
    def _skip(layer: p.LayerFacts, factors: Iterable[p.Tensor], init: p.SlotInit) -> None:
        """The reference's modules draw once when they are made, and A again."""
        for factor in factors:
            init.skip_normal(factor) if layer.kind is p.Kind.EMBEDDING else init.skip_uniform(factor)

    def before_start(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        first, second, *_ = slots.values()
        if layer.kind is p.Kind.EMBEDDING:
            self._skip(layer, (first, second), init)
            return
        init.kaiming_uniform(first)  # which starts keep that give no A
        init.skip_uniform(second)

    def scaling(self, c: LoraConfig, layer: p.LayerFacts) -> float:
        own = c.lora_alpha / (math.sqrt(c.r) if c.use_rslora else c.r)
        counts_twice = layer.kind is p.Kind.LINEAR and layer.cls == "MultiheadAttention"
        return 2 * own if counts_twice else own  # of its output layer: what the reference computes, files of it mean

    def of_rank(self, c: LoraConfig, rank: int) -> LoraConfig | None:
        plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        return c.model_copy(update=plain)

    def of_twice(self, c: LoraConfig) -> LoraConfig:
        wider = math.sqrt(2) if c.use_rslora else 2
        changes = {
            "r": 2 * c.r,
            "lora_alpha": wider * c.lora_alpha,
            "rank_pattern": {key: 2 * rank for key, rank in c.rank_pattern.items()},
            "alpha_pattern": {key: wider * alpha for key, alpha in c.alpha_pattern.items()},
        }
        return c.model_copy(update={**changes, "init_lora_weights": True})

    def of_thin(self, c: LoraConfig, layer: p.LayerFacts, A: p.Tensor, B: p.Tensor) -> p.Tensors:
        first, second, *_ = self.slots(c, layer)
        return {first.name: A.reshape(first.shape), second.name: B.reshape(second.shape)}

    def joined(
        self, c: LoraConfig, layer: p.LayerFacts, label: str, experts: Sequence[Sequence[p.Former[p.Tensor] | None]]
    ) -> p.Tensor:
        """`A` of layers joined by rows under each other, `B` block-diagonal; ranks that are left over are zero."""
        first = next(former.value for expert in experts for former in expert if former is not None)
        held = first.new_zeros(layer.experts, c.r, layer.in_features)
        is_second = label.startswith("lora_B")
        if is_second:
            held = first.new_zeros(layer.experts, layer.out_features, c.r)
        for expert, parts in zip(held, experts, strict=True):
            at, rows = 0, layer.out_features // len(parts)
            for part, former in enumerate(parts):
                if former is None:
                    continue
                end = at + former.value.shape[1 if is_second else 0]
                if is_second:
                    value = former.value if former.ratio == 1 else former.value * former.ratio
                    expert[part * rows : (part + 1) * rows, at:end] = value
                else:
                    expert[at:end] = former.value
                at = end
        return held.permute(1, 2, 0).flatten(1) if is_second else held.flatten(0, 1)

    def parted(self, c: LoraConfig, layer: p.LayerFacts, parts: int, slots: p.Tensors) -> Sequence[Sequence[p.Tensors]]:
        """Each part's rows of `B`, with all of `A`; with the part's own rank alone where `B` is block-diagonal."""
        first, second, *_ = self.slots(c, layer)
        A = slots[first.name].reshape(layer.experts, -1, layer.in_features)
        B = slots[second.name].reshape(layer.out_features, -1, layer.experts).permute(2, 0, 1)
        rank, rows = A.shape[1], layer.out_features // parts
        blocks = B.reshape(layer.experts, parts, rows, rank)
        own = rank // parts if rank % parts == 0 else rank
        beyond = blocks.clone()
        for part in range(parts):
            beyond[:, part, :, part * own : (part + 1) * own] = 0
        diagonal = own < rank and not bool(beyond.any())
        spans = [slice(part * own, (part + 1) * own) if diagonal else slice(None) for part in range(parts)]
        return [
            [{first.name: A[e, span], second.name: blocks[e, part, :, span]} for part, span in enumerate(spans)]
            for e in range(layer.experts)
        ]

    def check(self, c: LoraConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        if c.r % layer.groups:
            what = f"`{path}` is a convolution of {layer.groups} groups, and a rank of {c.r} is no multiple of them"
            fix = "Set `r`, or a `rank_pattern` for it, to a multiple, or exclude it with `exclude_modules`."
            yield p.rules.BAD_TARGET(what, why="Each group has an equal part of the rank.", fix=fix, where=path)

    def thin(self, a: p.View[LoraConfig]) -> p.Factors:
        if a.layer.kind is p.Kind.EMBEDDING:
            return a.lora_embedding_A, a.lora_embedding_B, a.scaling
        if a.layer.experts:  # experts follow each other in A, and alternate in B
            A = a.lora_A.reshape(a.layer.experts, -1, a.layer.in_features)
            B = a.lora_B.reshape(a.layer.out_features, -1, a.layer.experts)
            return A, B.permute(2, 0, 1), a.scaling
        return a.lora_A, a.lora_B, a.scaling


class GroupedLoraTuner(LoraTuner):
    """The same on a convolution of several groups, as the reference has it: `A` reads all channels, and each group of
    outputs has an equal part of the rank for itself. The layer's own weight has only the channels of its group for each
    output, so that the update is beside it and not in it."""

    supports = p.CONV_KINDS
    beside = "it reads the channels of all groups, and the weight only those of its own"
    additive = False
    thin = p.MapTuner.thin

    def branch(self, a: p.View[LoraConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        return a.up(a.lora_B, a.down(a.lora_A, x)) * a.scaling
