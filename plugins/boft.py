"""BOFT: the weight times a product of block-diagonal rotations in butterfly order (Liu et al., arXiv:2311.06243, section 4).

`W' = diag(s) W (B_m … B_1)ᵀ`. Factor i rotates blocks whose halves lie `2^(i-1)` half-blocks apart, so that a few sparse factors
mix all features. The input goes through them one after the other; no matrix of its width is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from peftc.plugin import (
    CONV_KINDS,
    EXPERT_KINDS,
    LINEAR_KINDS,
    Diagnostic,
    ExpertsMixin,
    Field,
    LayerFacts,
    LayersMixin,
    MapTuner,
    ModulesToSaveMixin,
    PeftConfig,
    PeftType,
    Slot,
    SlotInit,
    TargetsMixin,
    TunerMethod,
    View,
    hookimpl,
    parameter_slot,
    rules,
)

from .oft import cayley, dropped, turned

if TYPE_CHECKING:
    from torch import Tensor


class BOFTConfig(TargetsMixin, ExpertsMixin, LayersMixin, ModulesToSaveMixin, PeftConfig):
    """Options of a BOFT adapter, named as in the reference. Give `boft_block_size`, or `boft_block_num` and a size of 0."""

    peft_type: PeftType | None = PeftType("BOFT")
    boft_block_size: int = Field(default=4, ge=0)
    """Size of the blocks: larger learns more and costs more; 0 follows from `boft_block_num`."""
    boft_block_num: int = Field(default=0, ge=0)
    """Number of blocks in each layer; 0 follows from `boft_block_size`."""
    boft_n_butterfly_factor: int = Field(default=1, ge=1)
    """Number of factors; each further one doubles how many features a feature can be mixed with."""
    boft_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of leaving a block of one factor unrotated in training."""
    fan_in_fan_out: bool = False
    """Whether the adapted layers store their weight as (in, out); set by itself where they do."""
    bias: str = "none"
    """Biases of the base model to train along: `none`, `all`, or `boft_only` for those of adapted layers."""
    init_weights: bool = True
    """Start without a rotation and at a scale of 1; otherwise at random."""

    def contradictions(self) -> Iterable[Diagnostic]:
        """The size of blocks given twice or not at all."""
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            named = "`boft_block_size` and `boft_block_num`"
            what = f"Both of {named} are given" if self.boft_block_num else f"Neither of {named} is given"
            fix = "Set `boft_block_size` to 0." if self.boft_block_num else "Set one of them."
            yield rules.CONTRADICTION(f"{what}, and each follows from the other", fix=fix, where="boft_block_size")


class BoftTuner(MapTuner[BOFTConfig]):
    """`y = s · (W B x) + b`; for a convolution the rotations act on its flattened patches."""

    supports = LINEAR_KINDS | CONV_KINDS | EXPERT_KINDS
    input_space = "patches"
    recomputes_input = True
    spares_bias = True

    def slots(self, c: BOFTConfig, layer: LayerFacts) -> Iterable[Slot]:
        size = layer.in_features // layer.groups * math.prod(layer.kernel)
        block = min(c.boft_block_size, size) or max(1, size // c.boft_block_num)
        yield parameter_slot("boft_R", (c.boft_n_butterfly_factor, size // block, block, block))
        yield parameter_slot("boft_s", (1, layer.out_features) if layer.kernel else (layer.out_features, 1))

    def fitted(self, c: BOFTConfig, layer: LayerFacts, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Slot]:
        """With as many factors as the file has: where the reference lacks its CUDA extension it trains one, whatever the
        options say."""
        factors = shapes.get("boft_R", (0,))[0]
        fewer = c.model_copy(update={"boft_n_butterfly_factor": min(max(1, factors), c.boft_n_butterfly_factor)})
        return self.slots(fewer, layer)

    def init(self, c: BOFTConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        if c.init_weights:
            init.zeros(slots["boft_R"])
            init.ones(slots["boft_s"])
        else:
            init.normal(slots["boft_R"], std=0.1)
            init.normal(slots["boft_s"], std=0.1, mean=1.0)

    def check(self, c: BOFTConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        size = layer.in_features // layer.groups * math.prod(layer.kernel)
        misfit = _misfit(c, size)
        if misfit:
            yield rules.BAD_TARGET(
                f"Butterfly factors do not fit `{path}`: {misfit}",
                fix="Exclude it with `exclude_modules`, or choose blocks that fit all layers.",
                where=path,
            )

    def input(self, a: View, x: Tensor) -> Tensor:
        c: BOFTConfig = a.config  # type: ignore[assignment]  # this plugin's config
        entries = a.boft_R
        if entries.dtype.itemsize < 4:  # there is no solver in half precision
            entries = entries.float()
        factors = cayley((entries - entries.mT) / 2)
        if c.boft_dropout and a.training:
            factors = _one_dropped(factors, c.boft_dropout)
        columns = x.to(factors.dtype).reshape(-1, x.shape[-1]).t()
        for level in reversed(range(factors.shape[0])):
            columns = _butterfly(columns, factors[level], level)
        return columns.t().reshape(x.shape).to(x.dtype)

    def output(self, a: View, y: Tensor) -> Tensor:
        return y * a.boft_s.flatten()


def _misfit(c: BOFTConfig, size: int) -> str:
    """Why layers of so many features cannot have these blocks; empty if they can."""
    asked = c.boft_block_size or c.boft_block_num
    if size % asked:
        return f"{asked} does not divide its {size} features"
    if c.boft_n_butterfly_factor == 1:
        return ""
    block = c.boft_block_size or size // c.boft_block_num
    span = 2 ** (c.boft_n_butterfly_factor - 1)
    if block % 2:
        return f"blocks of {block} cannot be halved, as more than one factor needs"
    if size // block % span:
        return f"{c.boft_n_butterfly_factor} factors need a multiple of {span} blocks, and there are {size // block}"
    return ""


def _butterfly(columns: Tensor, R: Tensor, level: int) -> Tensor:
    """Columns `(features, rows)` through one factor, R `(blocks, b, b)`.

    Of each run of `2^level` blocks, block j rotates half-block j together with half-block `j + 2^level`.
    """
    if level == 0:
        return turned(columns, R)
    span, half, rows = 2**level, R.shape[1] // 2, columns.shape[1]
    paired = columns.reshape(-1, 2, span, half, rows).transpose(1, 2)
    together = turned(paired.reshape(columns.shape), R)
    return together.view(-1, span, 2, half, rows).transpose(1, 2).reshape(columns.shape)


def _one_dropped(factors: Tensor, p: float) -> Tensor:
    """The factors `(m, blocks, b, b)`, one of them, chosen at random, without some of its blocks."""
    import torch

    chosen = torch.randint(factors.shape[0], (1,), device=factors.device)
    mask = torch.arange(factors.shape[0], device=factors.device) == chosen
    return torch.where(mask.view(-1, 1, 1, 1), dropped(factors, p), factors)


def check(c: BOFTConfig) -> Iterable[Diagnostic]:
    """Unknown biases, and starts that rotate."""
    if c.bias not in ("none", "all", "boft_only"):
        yield rules.BAD_VALUE(f"`bias` cannot be `{c.bias}`", fix="Use `none`, `all` or `boft_only`.", where="bias")
    if not c.init_weights:
        yield rules.NOT_IDENTITY(
            "Rotations and scales start at random", fix="Leave out `init_weights`.", where="init_weights"
        )


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "BOFT",
        BOFTConfig,
        BoftTuner(),
        prefix="boft_",
        layer_names=("boft_R", "boft_s"),
        layer_options={
            "boft_block_size": "boft_block_size",
            "boft_block_num": "boft_block_num",
            "boft_dropout": "boft_dropout",
        },
        model_class="BOFTModel",
        layer_class="BOFTLayer",
        default_targets={"target_modules": "boft"},
        summary="A product of block-diagonal rotations, in butterfly order, and a scale of the rows of each frozen weight.",
        paper="arXiv:2311.06243",
        examples=({"boft_block_size": 4}, {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
        check=check,
        identity_at_start=lambda c: c.init_weights,
    )
