"""Number formats of a model that is to be trained: quantised bases made ready, frozen and trained tensors cast."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.model.functions.state import slots_of
from peftc.model.injected import adapters_of, followed
from peftc.model.peft_model import PeftModel
from peftc.runtime.around.lifted import lift
from peftc.runtime.journal import keep_memory, whole
from peftc.runtime.slots.containers import put

M = TypeVar("M", bound=nn.Module)

#: Quantised formats whose tensors outside of quantised layers stay in half precision.
_KEEP_HALF = frozenset({"gptq", "aqlm", "eetq", "hqq", "torchao"})
_HALF = frozenset({torch.float16, torch.bfloat16})


def prepare_model_for_kbit_training(
    model: M,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> M:
    """Make a quantised base ready to be trained through: freeze it, but not adapters that it has already, lift half precision to float32, save activations.

    Norms, biases and embeddings that are not quantised are cast to float32, except for formats whose kernels want them in
    half precision. On a quantised model `use_gradient_checkpointing` switches checkpointing on, with
    `gradient_checkpointing_kwargs`; unless these say `use_reentrant: False`, inputs are made to require gradients.
    `auto_clear_cache` gives the freed memory back to the accelerator. Returns the model itself.
    """
    keeps_half = _method_of(model) in _KEEP_HALF or bool(getattr(model, "hqq_quantized", False))
    own = _of_adapters(model)
    for parameter in model.parameters():
        if parameter not in own:
            parameter.requires_grad_(False)
    if not keeps_half:
        for parameter in model.parameters():
            if parameter.dtype in _HALF and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()
    in_bits = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if use_gradient_checkpointing and (in_bits or keeps_half):
        _checkpoint(model, dict(gradient_checkpointing_kwargs or {}))
    return model


def _of_adapters(model: nn.Module) -> set[Tensor]:
    """The tensors of adapters that the model has already."""
    session = model.session if isinstance(model, PeftModel) else followed(model)
    plans = () if session is None else session.plans
    own = {tensor for name in plans if session is not None for tensor in session.tensors(name).values()}
    encoders = model.prompt_encoder if isinstance(model, PeftModel) else None
    return own | set(() if encoders is None else encoders.parameters())


def _method_of(model: nn.Module) -> str:
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method) or "")


def _checkpoint(model: nn.Module, options: dict[str, Any]) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        what = f"A {type(model).__name__} cannot recompute activations"
        raise PeftcError(rules.BAD_VALUE(what, fix="Pass `use_gradient_checkpointing=False`."))
    if options.get("use_reentrant", True):
        require = getattr(model, "enable_input_require_grads", None)
        if require is not None:
            require()
        else:
            embeddings = model.get_input_embeddings()  # type: ignore[operator]  # a model that can checkpoint has them
            embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    takes = inspect.signature(enable).parameters
    if "gradient_checkpointing_kwargs" in takes:
        enable(gradient_checkpointing_kwargs=options)
    elif options:
        what = f"`gradient_checkpointing_enable` of {type(model).__name__} takes no options: {', '.join(options)}"
        raise PeftcError(rules.BAD_VALUE(what, fix="Leave `gradient_checkpointing_kwargs` out."))
    else:
        enable()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to `dtype` and trained ones to float32, in place, for training under autocast."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


@whole
def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Lift an adapter's slots of less than 4 bytes per number to float32, as new parameters, and what is in half precision of
    modules that it trains whole; base weights stay.

    Raises `PeftcError` if there is no such adapter.
    """
    session = adapters_of(model)
    session.require([adapter_name])
    if not autocast_adapter_dtype:
        return
    lifted: dict[Tensor, Tensor] = {}  # what layers share stays one tensor
    for _, layer, slot in slots_of(session, adapter_name):
        container, key = layer.where(adapter_name, slot)
        own: Tensor = container[key]
        if own.is_floating_point() and own.dtype.itemsize < 4:
            if own not in lifted:
                wide = own.detach().float()
                lifted[own] = wide if slot.derived else nn.Parameter(wide, requires_grad=own.requires_grad)
            put(layer.room, slot, adapter_name, lifted[own])
    for copy in session.copies_of(adapter_name):
        for tensor in (*copy.parameters_of(adapter_name), *copy.modules_to_save[adapter_name].buffers()):
            keep_memory(tensor)
            lift(tensor)
