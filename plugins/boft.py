"""BOFT: a product of block-diagonal rotations, in butterfly order, and a scale of the rows of each frozen weight (Liu et al.,
arXiv:2311.06243, section 4).

`W' = diag(s) W (B_m … B_1)ᵀ`. Factor i rotates blocks whose halves lie `2^(i-1)` half-blocks apart, so that a few sparse factors
mix all features. The input goes through them one after the other; no matrix of its width is ever made.
"""

from __future__ import annotations

from typing import Literal

from peftc import plugin as p

from .oft import cayley, dropped, not_one_of, rotates, turned


class BOFTConfig(p.ExpertsMixin, p.OrientationMixin, p.BiasMixin, p.InitWeightsMixin, p.LayersConfig):
    """Options of a BOFT adapter, named as in the reference. Give `boft_block_size`, or `boft_block_num` and a size of 0."""

    peft_type: p.PeftType | None = p.PeftType("BOFT")
    boft_block_size: int = p.Field(default=4, ge=0)
    """Size of the blocks: larger learns more and costs more; 0 follows from `boft_block_num`."""
    boft_block_num: int = p.Field(default=0, ge=0)
    """Number of blocks in each layer; 0 follows from `boft_block_size`."""
    boft_n_butterfly_factor: p.Count = 1
    """Number of factors; each further one doubles how many features a feature can be mixed with."""
    boft_dropout: p.Dropout = 0.0
    """Probability of leaving a block of one factor unrotated in training."""
    bias: Literal["none", "all", "boft_only"] = "none"

    def contradictions(self) -> p.Problems:
        """The size of blocks given twice or not at all."""
        yield from not_one_of(self, "boft_block_size", "boft_block_num")


class BoftTuner(p.MapTuner[BOFTConfig]):
    """`y = s · (W B x) + b`; for a convolution the rotations act on its flattened patches."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | p.EXPERT_KINDS
    input_space = "patches"
    recomputes_input = True
    spares_bias = True

    def slots(self, c: BOFTConfig, layer: p.LayerFacts) -> p.Slots:
        size = layer.fan_in
        block = min(c.boft_block_size, size) or max(1, size // c.boft_block_num)
        yield p.parameter_slot("boft_R", (c.boft_n_butterfly_factor, size // block, block, block))
        yield p.parameter_slot("boft_s", (1, layer.out_features) if layer.kernel else (layer.out_features, 1))

    def fitted(self, c: BOFTConfig, layer: p.LayerFacts, shapes: p.Shapes) -> p.Slots:
        """With as many factors as the file has: where the reference lacks its CUDA extension it trains one, whatever the
        options say."""
        factors = shapes.get("boft_R", (0,))[0]
        fewer = c.model_copy(update={"boft_n_butterfly_factor": min(max(1, factors), c.boft_n_butterfly_factor)})
        return self.slots(fewer, layer)

    def init(self, c: BOFTConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        if c.init_weights:
            init.zeros(slots["boft_R"])
            init.ones(slots["boft_s"])
        else:
            init.normal(slots["boft_R"], std=0.1)
            init.normal(slots["boft_s"], std=0.1, mean=1.0)

    def check(self, c: BOFTConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        misfit = _misfit(c, layer.fan_in)
        if misfit:
            fix = "Exclude it with `exclude_modules`, or choose blocks that fit all layers."
            yield p.rules.BAD_TARGET(f"Butterfly factors do not fit `{path}`: {misfit}", fix=fix, where=path)

    def input(self, a: p.View[BOFTConfig], x: p.Tensor) -> p.Tensor:
        c, entries = a.config, p.widened(a.boft_R)
        factors = cayley((entries - entries.mT) / 2)
        if c.boft_dropout and a.training:
            factors = _one_dropped(factors, c.boft_dropout)
        columns = x.to(factors.dtype).reshape(-1, x.shape[-1]).t()
        for level in reversed(range(factors.shape[0])):
            columns = _butterfly(columns, factors[level], level)
        return columns.t().reshape(x.shape).to(x.dtype)

    def output(self, a: p.View[BOFTConfig], y: p.Tensor) -> p.Tensor:
        return y * a.boft_s.flatten()


def _misfit(c: BOFTConfig, size: int) -> str:
    """Why layers of so many features cannot have these blocks; empty if they can."""
    asked = c.boft_block_size or c.boft_block_num
    if size % asked:
        return f"{asked} does not divide its {size} features"
    if c.boft_n_butterfly_factor == 1:
        return ""
    block = c.boft_block_size or size // c.boft_block_num
    if block % 2:
        return f"blocks of {block} cannot be halved, as more than one factor needs"
    blocks, levels = size // block, c.boft_n_butterfly_factor - 1
    # told by bits, as an option may be any number: each further factor doubles what the blocks must be a multiple of
    if levels >= blocks.bit_length() or blocks % (1 << levels):
        return f"{c.boft_n_butterfly_factor} factors need a multiple of 2^{levels} blocks, and there are {blocks}"
    return ""


def _butterfly(columns: p.Tensor, R: p.Tensor, level: int) -> p.Tensor:
    """Columns `(features, rows)` through one factor, R `(blocks, b, b)`.

    Of each run of `2^level` blocks, block j rotates half-block j together with half-block `j + 2^level`.
    """
    if level == 0:
        return turned(columns, R)
    span, half, rows = 2**level, R.shape[1] // 2, columns.shape[1]
    paired = columns.reshape(-1, 2, span, half, rows).transpose(1, 2)
    together = turned(paired.reshape(columns.shape), R)
    return together.view(-1, span, 2, half, rows).transpose(1, 2).reshape(columns.shape)


def _one_dropped(factors: p.Tensor, share: float) -> p.Tensor:
    """The factors `(m, blocks, b, b)`, one of them, chosen at random, without some of its blocks."""
    import torch

    chosen = torch.randint(factors.shape[0], (1,), device=factors.device)
    mask = torch.arange(factors.shape[0], device=factors.device) == chosen
    return torch.where(mask.view(-1, 1, 1, 1), dropped(factors, share), factors)


peftc_tuner = p.method(
    BOFTConfig,
    BoftTuner(),
    prefix="boft_",
    layer_names=("boft_R", "boft_s"),
    layer_options=("boft_block_size", "boft_block_num", "boft_dropout"),
    examples=({"boft_block_size": 4}, {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
    check=rotates,
)
