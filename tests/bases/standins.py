"""Layers of packages that cannot be installed or cannot run here, by their public layout, in plain torch.

They stand in for the layers in tests only: the names of their modules and classes, their attributes and the layout of
their buffers are those that the packages document, the arithmetic is written here. gptqmodel needs a compiler to be
installed, and transformers' linear layer in FP8 needs a kernel that exists for GPUs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's GEMM layout: the output that the k-th nibble of a word holds, among eight neighbours."""


def spread(words: Tensor, bits: int, dim: int) -> Tensor:
    """Unpack int32 `words` into their unsigned fields of `bits`, lowest first, along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = (words.unsqueeze(dim + 1) >> shifts.reshape((-1, 1) if dim == 0 else (-1,))) & (2**bits - 1)
    return fields.flatten(dim, dim + 1)


def gather(fields: Tensor, bits: int, dim: int) -> Tensor:
    """Pack unsigned `fields` of `bits` into int32 words, lowest first, along `dim`; the reverse of `spread`."""
    per = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    parts = fields.to(torch.int64).unflatten(dim, (-1, per))
    words = (parts << shifts.reshape((-1, 1) if dim == 0 else (-1,))).sum(dim + 1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def rounded(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes (in, out), zeros and scales (groups, out) of a `weight` (out, in), by rounding to nearest."""
    columns = weight.detach().t().unflatten(0, (-1, group_size))
    low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zeros = (-low / scales).round()
    codes = (columns / scales.unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, 2**bits - 1)
    return codes.flatten(0, 1).to(torch.int32), zeros.to(torch.int32), scales


class BaseQuantLinear(nn.Module):
    """Stands in for gptqmodel's class of that name, the root of all its layers: sizes, `bits`, `group_size`, buffers."""

    __module__ = "gptqmodel.nn_modules.qlinear"
    QUANT_TYPE = ""
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = bits, group_size
        self.maxq, self.pack_dtype, self.pack_factor = 2**bits - 1, torch.int32, 32 // bits
        self.desc_act, self.sym = False, False
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self.train(linear.training)

    def opened(self) -> Tensor:
        """The weight in floating point, (in, out)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in) times the weight that is opened for this call, as the package's kernels in plain torch do."""
        out = x @ self.opened().to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)


class PackableQuantLinear(BaseQuantLinear):
    """Stands in for gptqmodel's class of that name, the root of its GPTQ layers."""

    __module__ = "gptqmodel.nn_modules.qlinear"


class TorchQuantLinear(PackableQuantLinear):
    """Stands in for gptqmodel's GPTQ layer in plain torch (`gptqmodel` itself cannot be built here).

    Buffers, for `bits` in 2, 4, 8: `qweight` int32 (in * bits / 32, out), `qzeros` int32 (groups, out * bits / 32) in
    the second format, which stores zeros as they are (the first one stores them less one), `scales` (groups, out) and
    `g_idx` int32 (in), the group of every input. W[i, o] = scales[g_idx[i], o] * (q[i, o] - zeros[g_idx[i], o]).
    """

    __module__ = "gptqmodel.nn_modules.qlinear.torch"
    QUANT_TYPE = "torch"
    g_idx: Tensor

    def __init__(self, linear: nn.Linear, bits: int = 4, group_size: int = 32) -> None:
        super().__init__(linear, bits, group_size)
        codes, zeros, scales = rounded(linear.weight, bits, group_size)
        self.register_buffer("qweight", gather(codes, bits, 0))
        self.register_buffer("qzeros", gather(zeros, bits, 1))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", torch.arange(linear.in_features, dtype=torch.int32) // group_size)

    def qzero_format(self) -> int:
        """The format of `qzeros`: 2, zeros as they are."""
        return 2

    def dequantize_weight(self, num_itr: int = 1) -> Tensor:
        """The weight in floating point, (in, out), under the package's name."""
        zeros = spread(self.qzeros, self.bits, 1)
        group = self.g_idx.long()
        return self.scales[group] * (spread(self.qweight, self.bits, 0) - zeros[group])

    def opened(self) -> Tensor:
        """See `dequantize_weight`."""
        return self.dequantize_weight()


class AWQuantLinear(BaseQuantLinear):
    """Stands in for gptqmodel's class of that name, the root of its AWQ layers."""

    __module__ = "gptqmodel.nn_modules.qlinear"


class AwqTorchLinear(AWQuantLinear):
    """Stands in for gptqmodel's AWQ layer in plain torch, in the layout GEMM (`gptqmodel` itself cannot be built here).

    Buffers, 4 bits: `qweight` int32 (in, out / 8) and `qzeros` int32 (groups, out / 8), eight neighbouring outputs in
    a word in the order `ORDER`; `scales` (groups, out). W[i, o] = scales[g, o] * (q[i, o] - zeros[g, o]) with
    g = i // group_size; there is no `g_idx`.
    """

    __module__ = "gptqmodel.nn_modules.qlinear.torch_awq"
    QUANT_TYPE = "awq_torch"

    def __init__(self, linear: nn.Linear, group_size: int = 32) -> None:
        super().__init__(linear, 4, group_size)
        codes, zeros, scales = rounded(linear.weight, 4, group_size)
        self.register_buffer("qweight", gather(ordered(codes), 4, 1))
        self.register_buffer("qzeros", gather(ordered(zeros), 4, 1))
        self.register_buffer("scales", scales)

    def opened(self) -> Tensor:
        """The weight in floating point, (in, out)."""
        codes, zeros = (ordered(spread(words, 4, 1), back=True) for words in (self.qweight, self.qzeros))
        group = torch.arange(self.in_features) // self.group_size
        return self.scales[group] * (codes - zeros[group])


def ordered(fields: Tensor, back: bool = False) -> Tensor:
    """`fields` (rows, out) with every eight neighbours put in AWQ's order, or `back` from it."""
    order = torch.tensor(ORDER)
    return fields.unflatten(1, (-1, 8))[:, :, order.argsort() if back else order].flatten(1)
