"""Models whose weights are split between processes: by tensors (transformers), or into shards (DeepSpeed, FSDP)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


def parts(model: nn.Module) -> int:
    """Between how many processes each weight is split; 1 for a model that is whole.

    Relied on: transformers notes the number as `_tp_size` on the model that it splits (since 5.0), and reads it there in
    `load_adapter` (in 5.18 and after).
    """
    return getattr(model, "_tp_size", None) or 1


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor before it was sharded.

    Relied on: DeepSpeed's third stage notes it as `ds_shape` on a parameter whose content it takes out (0.3.10).
    """
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def gathered(tensor: Tensor) -> Tensor:
    """A copy of a tensor with all its content; itself if it has all. Every process has to ask for it.

    Relied on: `deepspeed.zero.GatheredParameters` makes parameters whole within its block (0.3.10).
    """
    if whole_shape(tensor) == tuple(tensor.shape):
        return tensor
    import deepspeed  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def gathering(module: nn.Module) -> AbstractContextManager[Any]:
    """Within, a module's tensors that DeepSpeed sharded are whole, to be read. Every process has to enter."""
    shards = [tensor for tensor in module.parameters() if whole_shape(tensor) != tuple(tensor.shape)]
    if not shards:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(shards)


def of_call(tensor: Tensor) -> Tensor:
    """A parameter that a module looked up during a call, whole, such that its gradient comes back in shards.

    Relied on: DeepSpeed's third stage gives modules a dictionary of parameters that makes one whole when it is looked up by
    `[]` during the engine's call (0.5). FSDP leaves `DTensor`s where its hooks did not run, as in what nobody calls; the
    gradient of each process is its own, and their mean is what FSDP trains on (2.6).
    """
    if type(tensor.data).__name__ != "DTensor":
        return tensor
    from torch.distributed.tensor import Partial

    own: Any = tensor
    whole: Tensor = own.full_tensor(grad_placements=[Partial("avg")] * own.device_mesh.ndim)
    return whole


#: Attributes under which wrappers hold the model that they wrap: `torch.compile`, FSDP (2.0), DDP and DataParallel (1.0).
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that torch puts round whole models."""
    while type(model).__module__.startswith("torch."):
        inner = next((model._modules[name] for name in _INSIDE if model._modules.get(name) is not None), None)
        if inner is None:
            return model
        model = inner
    return model


def sharded(model: nn.Module) -> nn.Module | None:
    """FSDP's wrapper, which alone knows the model's state dict; None for a model without one."""
    return model if "_fsdp_wrapped_module" in model._modules else None
