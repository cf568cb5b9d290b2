"""torch's own attention and encoder layers, which read parameters of the layers in them instead of calling these."""

from __future__ import annotations

from torch import nn

#: What `TransformerEncoderLayer` asks its attention for beside public attributes, to know whether its kernel fits (1.12).
PRIVATE = frozenset({"_qkv_same_embed_dim"})


def is_read_past(parent: nn.Module, module: nn.Module) -> bool:
    """Whether a layer's parameters are read by what is around it, and its own forward is passed over.

    Relied on: `MultiheadAttention.forward` reads those of `out_proj` (1.0); in evaluation `TransformerEncoderLayer` gives those
    of its layers, and `TransformerEncoder` those of its attention, to one kernel (1.12), unless
    `torch.backends.mha.set_fastpath_enabled(False)` (2.3).
    """
    return isinstance(module, nn.MultiheadAttention) or isinstance(
        parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    )
