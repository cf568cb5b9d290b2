"""QALoRA: A reads sums over groups of inputs (Xu et al., arXiv:2309.14717, section 3.3).

`y = W x + s · B A P x`, where P gives for each group of inputs the mean times the number of groups, as in the reference. So the
update is constant within a group of columns, which zero points of a weight that is quantised by groups can take. On other
linear layers it is a low-rank update like any, and is merged like one.
"""

from __future__ import annotations

from dataclasses import replace

from peftc import plugin as p

from .config import LoraConfig
from .plain import LoraTuner


class QALoraTuner(LoraTuner):
    """With A repeated for each input of a group."""

    supports = p.LINEAR_KINDS
    stacks_experts = False
    of_rank = p.MapTuner.of_rank
    of_thin = p.MapTuner.of_thin

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        first, second = super().slots(c, layer)
        yield replace(first, shape=(c.r, max(1, layer.in_features // c.qalora_group_size)))
        yield second

    def check(self, c: LoraConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        if layer.in_features % c.qalora_group_size:
            what = f"`{path}` has {layer.in_features} inputs, no multiple of `qalora_group_size: {c.qalora_group_size}`"
            fix = "Set `qalora_group_size` to a divisor of the inputs of all layers, or exclude the layer."
            yield p.rules.BAD_TARGET(what, why="Every group has equally many inputs.", fix=fix, where=path)

    def thin(self, a: p.View[LoraConfig]) -> p.Factors:
        size, A = a.config.qalora_group_size, a.lora_A
        return A.repeat_interleave(size, dim=1) * (A.shape[1] / size), a.lora_B, a.scaling


VARIANT = p.Variant(
    "LORA",
    "qalora",
    QALoraTuner(),
    chosen=lambda c: c.use_qalora,
    option="use_qalora",
    summary="A reads means over groups of inputs.",
    paper="arXiv:2309.14717",
    examples=({"r": 2, "use_qalora": True, "qalora_group_size": 2},),
)
