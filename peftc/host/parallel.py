"""Models whose weights are split between processes: by tensors (transformers), or into shards (DeepSpeed, FSDP)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


def parts(model: nn.Module) -> int:
    """Between how many processes each weight is split; 1 for a model that is whole.

    Relied on: transformers notes the number as `_tp_size` on the model that it splits (since 5.0), and reads it there in
    `load_adapter` (in 5.18 and after).
    """
    return getattr(model, "_tp_size", None) or 1


def split_styles(model: nn.Module) -> dict[str, str]:
    """How transformers splits the weights of one of its models by tensors: a style by the name of a module or a parameter, with
    `*` for numbers.

    Relied on: `tp_plan` of a `PreTrainedModel` (since 4.55); `_tp_plan` before.
    """
    return dict(getattr(model, "_tp_plan", None) or {})


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


#: Classes that hold parameters in shards: of FSDP (1.12), and what `fully_shard` makes of a module's class (2.6).
_SHARDERS = frozenset({"FullyShardedDataParallel", "FSDPModule"})
#: Names by which FSDP marks parameters that are views of a flat one, and under which it keeps the flat one (2.0).
_FLATTENED, _FLAT = "_fsdp_flattened", "_flat_param"


def sharded_by(modules: Iterable[nn.Module]) -> str | None:
    """Who holds parameters of these modules in shards and brings them for calls, if anybody: FSDP or DeepSpeed.

    Relied on: DeepSpeed's engine gives each module a `ZeROOrderedDict` of parameters in its third stage (0.5).
    """
    for module in modules:
        own, cls = module._parameters, type(module)
        if cls not in _KNOWN:
            _KNOWN[cls] = _is_sharder(cls)
        if _KNOWN[cls] or _FLAT in own:
            return "FSDP"
        if type(own) is not dict and type(own).__name__ == "ZeROOrderedDict":
            return "DeepSpeed"
        if _has_flattened(own):
            return "FSDP"
    return None


def is_flattened(modules: Iterable[nn.Module]) -> bool:
    """Whether parameters of these modules are for now parts of a flat one, without their shapes."""
    return any(_has_flattened(module._parameters) for module in modules)


def _has_flattened(parameters: Mapping[str, nn.Parameter | None]) -> bool:
    return any(getattr(tensor, _FLATTENED, False) for tensor in parameters.values())


#: Whether a class is one that holds parameters in shards, by class: it is asked of every module.
_KNOWN: dict[type, bool] = {}


def _is_sharder(cls: type) -> bool:
    return any(one.__name__ in _SHARDERS and one.__module__.startswith("torch.distributed.") for one in cls.__mro__)


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is in shards that torch itself puts together (`DTensor`, 2.5)."""
    return type(tensor).__name__ == "DTensor"


def is_shard(parameter: Tensor) -> bool:
    """Whether a parameter is, or was before it was gathered, in shards."""
    taken_out = whole_shape(parameter) != tuple(parameter.shape)
    return taken_out or is_distributed(parameter) or getattr(parameter, _FLATTENED, False)


def is_whole(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has, in shape and memory, all of a shape; it may be larger.

    Relied on: FSDP frees the storage of what parameters are views of (1.12).
    """
    if tensor.dim() != len(shape) or any(own < wanted for own, wanted in zip(tensor.shape, shape, strict=True)):
        return False
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0
    return not plain or tensor.untyped_storage().nbytes() > 0


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A value in the shards of another tensor, if that is in shards. Every process has to ask for it."""
    if not is_distributed(like) or is_distributed(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    own: Any = like
    return distribute_tensor(value, own.device_mesh, own.placements)


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
    if not is_distributed(tensor):
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
