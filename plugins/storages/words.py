"""Whole numbers of a few bits in larger words, and the grid that they stand for: what GPTQ and AWQ have in common."""

from __future__ import annotations

from peftc import plugin as p


def spread(words: p.Tensor, bits: int) -> p.Tensor:
    """The numbers of `bits` bits that rows of words hold, lowest first: (rows · word / bits, columns). One may lie in two words."""
    import torch

    word, mask, device = words.element_size() * 8, 2**bits - 1, words.device
    words = words.int()  # bytes would have no room for the mask
    bit = torch.arange(words.shape[0] * word // bits, device=device) * bits
    at, off = bit // word, (bit % word).to(words.dtype).unsqueeze(1)
    fields = (words[at] >> off) & mask
    if word % bits:
        rest = word - off  # bits that the first of two words has
        low = fields & torch.where(rest < bits, (1 << rest) - 1, mask)
        high = torch.where(rest < bits, words[(at + 1).clamp(max=words.shape[0] - 1)] << rest, 0)
        fields = (low | high) & mask
    found: p.Tensor = fields.int()
    return found


def gather(fields: p.Tensor, bits: int, words: p.Tensor) -> p.Tensor:
    """The inverse of `spread`, in the shape and dtype of `words`."""
    import torch

    word = words.element_size() * 8
    bit = torch.arange(fields.shape[0], device=fields.device) * bits
    shifted = fields.long() << (bit % word).unsqueeze(1)
    made = torch.zeros(words.shape[0] + 1, words.shape[1], dtype=torch.long, device=fields.device)
    made.index_add_(0, bit // word, shifted & (2**word - 1)).index_add_(0, bit // word + 1, shifted >> word)
    signed = torch.where(made >= 2 ** (word - 1), made - 2**word, made)
    return signed[:-1].to(words.dtype).to(words.device)


def on_grid(
    columns: p.Tensor, group: p.Tensor, scales: p.Tensor, zeros: p.Tensor, top: int, lowest: int | None
) -> tuple[p.Tensor, p.Tensor, p.Tensor]:
    """Whole numbers up to `top` for a weight (in, out), with scales and zeros (groups, out) for them. `group` is that of each input.

    A group keeps its grid unless another, that clips nothing of it, brings it nearer: so a weight that is on its grid stays. Zeros
    may be from `lowest` on; None keeps them.
    """
    import torch

    W, own, z = columns.float(), scales.float(), zeros.float()
    index = group.unsqueeze(1).expand_as(W)
    low, high = (torch.zeros_like(own).scatter_reduce(0, index, W, how) for how in ("amin", "amax"))
    grids = [(torch.maximum(high / (top - z), -low / z), z)]
    if lowest is not None:
        tight = (high - low) / top
        grids.append((tight, (-low / tight).round().nan_to_num().clamp(lowest, top)))
    error = _error(W, group, own, z, top)
    for wanted, other in grids:
        scale = wanted.to(scales.dtype).float()
        nearer = (found := _error(W, group, scale, other, top)) < error  # one that is no number errs by no number
        own, z, error = (
            torch.where(nearer, scale, own),
            torch.where(nearer, other, z),
            torch.where(nearer, found, error),
        )
    return _rounded(W, group, own, z, top).int(), own.to(scales.dtype), z.to(zeros.dtype)


def _rounded(W: p.Tensor, group: p.Tensor, scales: p.Tensor, zeros: p.Tensor, top: int) -> p.Tensor:
    divisor = scales.masked_fill(scales == 0, 1)[group]
    return (W / divisor + zeros[group]).round().clamp(0, top)


def _error(W: p.Tensor, group: p.Tensor, scales: p.Tensor, zeros: p.Tensor, top: int) -> p.Tensor:
    """By how much a number of each group is off at most."""
    import torch

    apart = scales[group] * (_rounded(W, group, scales, zeros, top) - zeros[group]) - W
    index = group.unsqueeze(1).expand_as(W)
    return torch.zeros_like(scales).scatter_reduce(0, index, apart.abs(), "amax")
