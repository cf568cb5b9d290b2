"""Layers of transformers whose weight is split between processes: how to call one as if it were whole, and how to read it.

Relied on (transformers 5.21): such a layer's parameters are `DTensor`s of one mesh; its `forward` is a function `tp_forward` in
the instance, which closes over a style as `self`, the `mesh` and the `original_forward`. A `ColwiseParallel` or a
`RowwiseParallel` has `input_layouts` and `output_layouts`, a `Shard` of the last dimension for what is split, and takes and
gives plain tensors where `use_local_output` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftc.host.parallel import is_distributed

#: Styles whose inputs and outputs are known.
_KNOWN = frozenset({"ColwiseParallel", "RowwiseParallel", "EmbeddingParallel"})
_FORWARD = "forward"


@dataclass(frozen=True, slots=True)
class Split:
    """How a layer is split: whether a process has a part of its input, and of its output, along the last dimension."""

    mesh: Any
    of_input: bool
    of_output: bool


def split_of(module: nn.Module) -> Split | None:
    """How a layer is split between processes; None for one that is whole, or is split in a way that is not known."""
    known = _closed_over(module)
    style = known.get("self")
    if style is None or type(style).__name__ not in _KNOWN or known["mesh"].ndim != 1 or not style.use_local_output:
        return None
    if isinstance(module, nn.Embedding):  # ids and vectors are whole
        return Split(known["mesh"], False, False)
    return Split(known["mesh"], _is_last(style.input_layouts), _is_last(style.output_layouts))


def is_split(module: nn.Module) -> bool:
    """Whether processes share a module itself, in whatever way: its parameters, or what it is called with."""
    return bool(_closed_over(module)) or any(p is not None and is_distributed(p) for p in module._parameters.values())


def _closed_over(module: nn.Module) -> Mapping[str, Any]:
    """What the forward in an instance closes over, if it is one of transformers' for split layers."""
    forward = module.__dict__.get(_FORWARD)
    if getattr(forward, "__name__", "") != "tp_forward":
        return {}
    names, cells = forward.__code__.co_freevars, forward.__closure__ or ()
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=True))


def _is_last(layout: Any) -> bool:
    return type(layout).__name__ == "Shard" and layout.dim == -1


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter that is split. Every process has to ask for it."""
    found: Any = tensor
    made: Tensor = found.full_tensor() if is_distributed(tensor) else tensor
    return made


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """Within, a split layer computes as its class does, with whole parameters that it is given."""
    state = module.__dict__
    if split_of(module) is None:
        yield
        return
    forward = state.pop(_FORWARD)
    try:
        yield
    finally:
        state[_FORWARD] = forward


# parts of activations -------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """A split layer as a whole one: whole input, whole output, the same in every process."""

    def __init__(self, base: nn.Module, layer: nn.Module, split: Split) -> None:
        super().__init__()
        self.__dict__.update(base=base, layer=layer, split=split)  # a view, which has no children

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        split: Split = self.__dict__["split"]
        if split.of_input:
            x = _part(x, split.mesh)
        y: Tensor = self.__dict__["base"](x, *args, **kwargs)
        return _joined(y, split.mesh, self.__dict__["layer"].out_features) if split.of_output else y


def in_parts(run: Callable[..., Tensor], layer: nn.Module, split: Split) -> Callable[..., Tensor]:
    """What computes a layer with whole input and output, as its model calls it: with a part of them."""
    if not split.of_input and not split.of_output:
        return run

    def called(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if split.of_input:
            size: Any = layer.in_features
            x = _joined(x, split.mesh, size)
        y = run(x, *args, **kwargs)
        return _part(y, split.mesh) if split.of_output else y

    return called


def _joined(part: Tensor, mesh: Any, size: int) -> Tensor:
    """All of what is split along its last dimension, of that size in all; its gradient is the same everywhere, and each process
    takes its part of it."""
    import torch
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shape = torch.Size((*part.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    own = DTensor.from_local(
        part.contiguous(), mesh, [Shard(part.dim() - 1)], run_check=False, shape=shape, stride=stride
    )
    made: Tensor = own.redistribute(placements=[Replicate()]).to_local()
    return made


def _part(whole: Tensor, mesh: Any) -> Tensor:
    """This process's part along the last dimension; the gradient is put together from those of all."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    own = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    made: Tensor = own.redistribute(placements=[Shard(whole.dim() - 1)]).to_local()
    return made


def agree(tensors: Mapping[str, Tensor], mesh: Any) -> None:
    """Give all processes of a mesh the first one's values of these tensors, in place. Every process has to ask for it."""
    import torch.distributed as dist

    group = mesh.get_group()
    first = dist.get_global_rank(group, 0)
    for name in sorted(tensors):
        tensor = tensors[name]
        if not tensor.is_meta:
            dist.broadcast(tensor.detach(), first, group=group)
