"""OFT: a block-diagonal rotation of the input of each frozen weight (Qiu et al., arXiv:2306.07280; this form, arXiv:2506.19847).

`W' = W Rᵀ` where each block of R is the Cayley transform of a skew-symmetric matrix, exact or by its Neumann series. The
input is rotated block by block, so neither R nor W' is ever made as one matrix.
"""

from __future__ import annotations

import math
from typing import Literal

from peftc import plugin as p

#: Blocks of a layer, and features of a block: far beyond what any has.
_MOST = 2**20


class OFTConfig(p.ExpertsMixin, p.OrientationMixin, p.BiasMixin, p.InitWeightsMixin, p.LayersConfig):
    """Options of an OFT adapter, named as in the reference. Give `oft_block_size`, or `r` with `oft_block_size=0`."""

    peft_type: p.PeftType | None = p.PeftType("OFT")
    r: int = p.Field(default=0, ge=0, le=_MOST)
    """Number of blocks in each layer; 0 follows from `oft_block_size`."""
    oft_block_size: int = p.Field(default=32, ge=0, le=_MOST)
    """Size of the blocks: larger learns more and costs more; 0 follows from `r`."""
    module_dropout: p.Dropout = 0.0
    """Probability of leaving a block unrotated in training."""
    bias: Literal["none", "all", "oft_only"] = "none"
    coft: bool = False
    """Keep the rotations near the identity (constrained OFT)."""
    eps: float = p.Field(default=6e-5, gt=0.0)
    """How near, with `coft`: the norm of the skew-symmetric blocks, over the root of their number."""
    block_share: bool = False
    """One rotation for all blocks of a layer."""
    use_cayley_neumann: bool = True
    """Compute the Cayley transform by its Neumann series: faster, and a rotation only up to its error."""
    num_cayley_neumann_terms: p.Count = 5
    """Terms of the series."""

    def contradictions(self) -> p.Problems:
        """The size of blocks given twice or not at all."""
        yield from not_one_of(self, "oft_block_size", "r")


class OftTuner(p.MapTuner[OFTConfig]):
    """`y = W (Rᵀ x) + b`; for a convolution the rotation acts on its flattened patches."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | p.EXPERT_KINDS
    input_space = "patches"
    recomputes_input = True
    slot = "oft_R"

    def size(self, layer: p.LayerFacts) -> int:
        """How many features are rotated."""
        return layer.fan_in

    def slots(self, c: OFTConfig, layer: p.LayerFacts) -> p.Slots:
        size = self.size(layer)
        block = _block_size(c, size)
        yield p.module_slot(self.slot, (1 if c.block_share else size // block, max(1, block * (block - 1) // 2)))

    def init(self, c: OFTConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        if c.init_weights:
            init.zeros(slots[self.slot])
        else:
            init.normal(slots[self.slot], std=0.1)

    def check(self, c: OFTConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        size = self.size(layer)
        block = _block_size(c, size)
        if block == 1:
            yield p.rules.BAD_TARGET(
                f"The {size} features of `{path}` would be in blocks of one, which cannot be rotated",
                fix="Set an `oft_block_size` of at least 2 that divides them, or exclude it with `exclude_modules`.",
                where=path,
            )
        elif block * c.r != size and block != c.oft_block_size:
            asked = f"`r` of {c.r}" if c.r else f"`oft_block_size` of {c.oft_block_size}"
            yield p.rules.BLOCKS_ADJUSTED(
                f"{asked} does not divide the {size} features of `{path}`: {size // block} blocks of {block}",
                fix="Give what divides the features of all layers, or exclude this one.",
                where=path,
            )

    def input(self, a: p.View[OFTConfig], x: p.Tensor) -> p.Tensor:
        return _rotated(a, a.oft_R, x)


class OftEmbeddingTuner(OftTuner):
    """`y = Rᵀ e` for the vector e of an id."""

    supports = frozenset({p.Kind.EMBEDDING})
    slot = "oft_embedding_R"
    input = p.MapTuner.input

    def size(self, layer: p.LayerFacts) -> int:
        return layer.out_features

    def output(self, a: p.View[OFTConfig], y: p.Tensor) -> p.Tensor:
        return _rotated(a, a.oft_embedding_R, y)


def _block_size(c: OFTConfig, size: int) -> int:
    """The size of blocks for that many features: as asked for where it divides them, else from the nearest that does."""
    return _nearest_divisor(c.oft_block_size, size) if c.r == 0 else size // _nearest_divisor(c.r, size)


def _nearest_divisor(wanted: int, size: int) -> int:
    """The divisor of `size` nearest to what is wanted, the smaller of two that are equally near.

    >>> _nearest_divisor(8, 24), _nearest_divisor(7, 20), _nearest_divisor(7, 24), _nearest_divisor(99, 24)
    (8, 5, 6, 24)
    """
    wanted = max(1, min(wanted, size))
    near = (d for away in range(wanted) for d in (wanted - away, wanted + away) if d <= size and size % d == 0)
    return next(near, 1)  # of a layer without features


def _rotated(a: p.View[OFTConfig], vectors: p.Tensor, x: p.Tensor) -> p.Tensor:
    """`Rᵀ x` for rows x `(..., features)` and the entries above the diagonals, `(blocks, b (b - 1) / 2)`."""
    c, vectors = a.config, p.widened(vectors)
    if c.coft:
        vectors = _within(vectors, c.eps)
    block = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    Q = skew_symmetric(vectors, block)
    R = _neumann(Q, c.num_cayley_neumann_terms) if c.use_cayley_neumann else cayley(Q)
    rows = x.to(R.dtype)
    if c.module_dropout and a.training:
        R = dropped(R.expand(x.shape[-1] // block, block, block), c.module_dropout)
    return rotated(rows, R).to(x.dtype)


def _within(vectors: p.Tensor, eps: float) -> p.Tensor:
    """Blocks projected to where their norm is at most `eps / sqrt(blocks)`; the slots are left as they are.

    The gradient is that at the projected point, as in projected gradient descent.
    """
    import torch

    with torch.no_grad():
        norm = math.sqrt(2) * vectors.norm(dim=1, keepdim=True)  # each entry stands twice in the matrix
        limit = eps / math.sqrt(vectors.shape[0])
        inside = vectors * (limit / norm.clamp(min=limit))
    passed: p.Tensor = inside + (vectors - vectors.detach())
    return passed


def skew_symmetric(vectors: p.Tensor, size: int) -> p.Tensor:
    """`(blocks, size, size)` from the entries above the diagonals, row by row, `(blocks, size (size - 1) / 2)`."""
    import torch

    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(vectors.shape[0], size * size).index_copy(1, rows * size + columns, vectors)
    upper = upper.view(-1, size, size)
    return upper - upper.mT


def cayley(Q: p.Tensor) -> p.Tensor:
    """`(I - Q) (I + Q)⁻¹` for skew-symmetric Q `(..., b, b)`: a rotation each."""
    import torch

    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    rotation: p.Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
    return rotation


def _neumann(Q: p.Tensor, terms: int) -> p.Tensor:
    """`I + 2 Q + 2 Q² + … + Qᵗ⁻¹`, the series of `(I + Q) (I - Q)⁻¹`; three terms are computed as four.

    So the reference computes it, and adapters mean it; the exact transform has the other sign of Q.
    """
    import torch

    series = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + 2 * Q
    power = Q
    last = terms - 1 if terms != 3 else 3
    for k in range(2, last + 1):
        power = power @ Q
        series = series + (power if k == last else 2 * power)
    return series


def rotated(x: p.Tensor, R: p.Tensor) -> p.Tensor:
    """Each block of features of x `(..., blocks · b)` times its matrix, R `(blocks, b, b)` or `(1, b, b)` for all."""
    return turned(x.reshape(-1, x.shape[-1]).t(), R).t().reshape(x.shape)


def turned(columns: p.Tensor, R: p.Tensor) -> p.Tensor:
    """The same of x as columns `(blocks · b, rows)`: products with small blocks are several times faster so."""
    return (R.mT @ columns.reshape(-1, R.shape[1], columns.shape[1])).view(columns.shape)


def dropped(R: p.Tensor, share: float) -> p.Tensor:
    """The blocks `(..., b, b)`, each the identity with the probability `share` (multiplicative dropout)."""
    import torch

    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.where(torch.rand(*R.shape[:-2], 1, 1, device=R.device) < share, eye, R)


def check(c: OFTConfig) -> p.Problems:
    """Series that are constant, and starts that rotate."""
    if c.use_cayley_neumann and c.num_cayley_neumann_terms == 1:
        what, fix = "A series of 1 term is the identity whatever is learned", "Set it to 2 or more; 5 is usual."
        yield p.rules.BAD_VALUE(what, fix=fix, where="num_cayley_neumann_terms")
    yield from rotates(c)


def rotates(c: p.InitWeightsMixin) -> p.Problems:
    """Starts that rotate."""
    if not c.init_weights:
        yield p.rules.NOT_IDENTITY("Rotations start at random", fix="Leave out `init_weights`.", where="init_weights")


def not_one_of(c: p.PeftConfig, size: str, number: str) -> p.Problems:
    """The problem of a size and a number of blocks that are both given, or neither is."""
    count = getattr(c, number)
    if bool(count) == bool(getattr(c, size)):
        what = f"Both of `{size}` and `{number}` are given" if count else f"Neither of `{size}` and `{number}` is given"
        fix = f"Set `{size}` to 0 to have {count} blocks." if count else "Set one of them."
        yield p.rules.CONTRADICTION(f"{what}, and each follows from the other", fix=fix, where=size)


peftc_tuner = p.method(
    OFTConfig,
    (OftTuner(), OftEmbeddingTuner()),
    prefix="oft_",
    layer_names=("oft_R", "oft_embedding_R"),
    layer_options={"r": "r", "oft_block_size": "oft_block_size", "oft_dropout": "module_dropout"},
    examples=(
        {"oft_block_size": 4},
        {"r": 2, "oft_block_size": 0, "block_share": True, "use_cayley_neumann": False},
    ),
    check=check,
)
