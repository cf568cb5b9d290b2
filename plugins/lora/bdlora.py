"""BD-LoRA: one of the factors is block-diagonal, so that servers that split a model need not exchange what it gives.

`y = W x + s · B A x` with A, or B, of blocks along the diagonal; stored are the blocks, one below the other.
"""

from __future__ import annotations

from dataclasses import replace

from peftc import plugin as p

from .config import LoraConfig
from .nested import BdLoraConfig
from .plain import LoraTuner


class _Blocks(LoraTuner):
    """What both have in common."""

    supports = p.LINEAR_KINDS
    stacks_experts = False
    of_rank = p.MapTuner.of_rank
    of_thin = p.MapTuner.of_thin

    def check(self, c: LoraConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        blocks = _options(c).nblocks
        odd = [f"{name} {size}" for name, size in self.divided(c, layer).items() if size % blocks]
        if odd:
            what = f"`nblocks: {blocks}` does not divide {' and '.join(odd)} of `{path}`"
            fix = "Set `nblocks` to a common divisor of ranks and features, or exclude the layer."
            yield p.rules.BAD_TARGET(what, why="All blocks are of one size.", fix=fix, where=path)

    def divided(self, c: LoraConfig, layer: p.LayerFacts) -> dict[str, int]:
        """The sizes of the matrix that consists of blocks, by what they are."""
        raise NotImplementedError


class BlocksOfA(_Blocks):
    """With A block-diagonal."""

    def divided(self, c: LoraConfig, layer: p.LayerFacts) -> dict[str, int]:
        return {"rank": c.r, "inputs": layer.in_features}

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        first, second = super().slots(c, layer)
        yield replace(first, shape=(c.r, max(1, layer.in_features // _options(c).nblocks)))
        yield second

    def init(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        _begin(self, c, layer, slots, init)
        init.kaiming_uniform(slots["lora_A"], a=0)

    def thin(self, a: p.View[LoraConfig]) -> p.Factors:
        return _diagonal(a, a.lora_A), a.lora_B, a.scaling


class BlocksOfB(_Blocks):
    """With B block-diagonal."""

    def divided(self, c: LoraConfig, layer: p.LayerFacts) -> dict[str, int]:
        return {"rank": c.r, "outputs": layer.out_features}

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        first, second = super().slots(c, layer)
        yield first
        yield replace(second, shape=(layer.out_features, max(1, c.r // _options(c).nblocks)))

    def init(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        _begin(self, c, layer, slots, init)
        init.zeros(slots["lora_B"])

    def thin(self, a: p.View[LoraConfig]) -> p.Factors:
        return a.lora_A, _diagonal(a, a.lora_B), a.scaling


class Whole(LoraTuner):
    """For modules that no list means: as without blocks, if that is allowed."""

    supports = p.LINEAR_KINDS
    stacks_experts = False

    def check(self, c: LoraConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        of_a, of_b = _meant(c, path)
        if of_a and of_b:
            what = f"Both `target_modules_bd_a` and `target_modules_bd_b` mean `{path}`"
            yield p.rules.BAD_TARGET(what, fix="Write longer names.", where=path)
        elif _options(c).match_strict:
            what = f"Neither `target_modules_bd_a` nor `target_modules_bd_b` means `{path}`"
            fix = "Add it to one of them, or set `match_strict: false` if it is to have no blocks."
            yield p.rules.BAD_TARGET(what, why="`match_strict` asks for blocks everywhere.", fix=fix, where=path)


BLOCKS_OF_A, BLOCKS_OF_B, WHOLE = BlocksOfA(), BlocksOfB(), Whole()


def tuner_for(c: LoraConfig, node: p.ModuleNode) -> LoraTuner:
    """By which of the lists means the module."""
    meant = _meant(c, node.path)
    return {(True, False): BLOCKS_OF_A, (False, True): BLOCKS_OF_B}.get(meant, WHOLE)


def _options(c: LoraConfig) -> BdLoraConfig:
    assert c.use_bdlora is not None
    return c.use_bdlora


def _meant(c: LoraConfig, path: str) -> tuple[bool, bool]:
    """Whether the lists of A and of B mean a module: by texts that occur in its path."""
    lists = _options(c).target_modules_bd_a, _options(c).target_modules_bd_b
    of_a, of_b = (any(text in path for text in texts or ()) for texts in lists)
    return of_a, of_b


def _diagonal(a: p.View[LoraConfig], blocks: p.Tensor) -> p.Tensor:
    import torch

    made: p.Tensor = torch.block_diag(*blocks.chunk(_options(a.config).nblocks))  # type: ignore[no-untyped-call]
    return made


def _begin(tuner: LoraTuner, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
    """The start of whole factors, of which those that stay are kept: what is drawn then is the reference's."""
    whole = {
        slot.name: slots[slot.name] if slots[slot.name].shape == slot.shape else slots[slot.name].new_empty(slot.shape)
        for slot in LoraTuner.slots(tuner, c, layer)
    }
    LoraTuner.init(tuner, c, layer, whole, init)


VARIANT = p.Variant(
    "LORA",
    "bdlora",
    tuner_for,
    choices=(BLOCKS_OF_A, BLOCKS_OF_B, WHOLE),
    chosen=lambda c: c.use_bdlora is not None,
    option="use_bdlora",
    summary="One of the factors consists of blocks along its diagonal.",
    examples=(
        {
            "r": 4,
            "use_bdlora": {
                "target_modules_bd_a": ["lin0", "emb", "down_proj"],
                "target_modules_bd_b": ["lin1"],
                "nblocks": 2,
                "match_strict": False,
            },
        },
    ),
)
