"""Where a module's tensors are: with it, or elsewhere, from where a hook, a parametrization or a shard brings them for a call.

The one place that reads and replaces tensors of base layers, and tensors of slots that are not where they were put. What is
elsewhere and cannot be brought is refused by name: nothing is merged or computed without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.host import offload, parallel, tensor_parallel
from peftc.host.torch_modules import computed_by
from peftc.ops.combine import padded
from peftc.ops.lowrank import is_traced
from peftc.runtime.journal import keep_values, note


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter or buffer as a call of it has it, differentiable where it can train; None if it has none.

    One on the meta device that nothing brings is given as it is.
    """
    parameter = module._parameters.get(name)
    tensor = module._buffers.get(name) if parameter is None else parameter
    if tensor is None:  # computed from others, or for now a view of what is sharded
        found = getattr(module, name, None)
        is_empty = name == "bias" and isinstance(found, Tensor) and not found.numel()  # how some libraries have none
        return found if isinstance(found, Tensor) and not is_empty else None
    if tensor.is_meta:
        return _brought(module, name, tensor)
    if tensor.requires_grad and torch.is_grad_enabled() and offload.hook_of(module) is not None:
        tensor.register_hook(lambda grad: _refuse_gradient(name))  # it is there for this call
    if parallel.is_distributed(tensor) and tensor_parallel.split_of(module) is not None:
        return tensor_parallel.whole(tensor)
    return parallel.gathered(tensor)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All of a module's own parameters by name, as a call of it has them."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    names += [name for name in elsewhere(module) if name not in names]
    found = ((name, tensor_of(module, name)) for name in names)
    return {name: tensor for name, tensor in found if tensor is not None}


def entire(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model, each as a call of its module would have it: those that are brought with their values, and all of
    those that are split, for which every process has to ask."""
    absent = _offloaded(model, tensors.values())
    split = _split(model, tensors.values())
    tensors = {key: tensor_parallel.whole(tensor) if id(tensor) in split else tensor for key, tensor in tensors.items()}
    found = {key: (tensor, absent.get(id(tensor))) for key, tensor in tensors.items()}
    return {key: tensor if at is None else _brought(*at, tensor) for key, (tensor, at) in found.items()}


def _split(model: nn.Module, tensors: Iterable[Tensor]) -> set[int]:
    """Of these tensors those that processes share as transformers splits layers, by identity."""
    shared = {id(tensor) for tensor in tensors if parallel.is_distributed(tensor)}
    if not shared:
        return set()
    layers = (module for module in model.modules() if tensor_parallel.split_of(module) is not None)
    return shared & {id(tensor) for layer in layers for tensor in layer._parameters.values()}


def _offloaded(model: nn.Module, tensors: Iterable[Tensor]) -> dict[int, tuple[nn.Module, str]]:
    """Of these tensors those that are brought for calls, by identity: their modules, and their names there."""
    absent = {id(tensor) for tensor in tensors if tensor.is_meta}
    if not absent:
        return {}
    return {
        id(tensor): (module, name)
        for module in model.modules()
        if offload.hook_of(module) is not None
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and id(tensor) in absent
    }


def elsewhere(module: nn.Module) -> list[str]:
    """Names of a module's tensors that are no parameters of its own, though it computes with them."""
    return [*computed_by(module), *(name for name, value in module.__dict__.items() if isinstance(value, Tensor))]


def _brought(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    value = offload.brought(module, name)
    if value is None:
        return tensor
    value = value.detach().to(tensor.dtype)
    if tensor.requires_grad and torch.is_grad_enabled() and not is_traced():
        value.requires_grad_().register_hook(lambda grad: _refuse_gradient(name))
    return value


def refuse_gradients_of(module: nn.Module, output: Any) -> None:
    """Have a backward through a module's output raise `PeftcError` if it would reach parameters that were there for the call."""
    if not torch.is_grad_enabled():
        return
    lost = next((name for name, p in module.named_parameters() if p.requires_grad and p.is_meta), None)
    if lost is None:
        return
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda grad: _refuse_gradient(lost))


def _refuse_gradient(name: str) -> None:
    what = f"`{name}` of an adapter is offloaded by accelerate, and its gradient would be lost"
    fix = "Offload the base model first and put the adapter on it then, or take the hooks off: `remove_hook_from_submodules`."
    raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix=fix))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: what is made for it belongs there."""
    hook = offload.hook_of(module)
    if hook is not None:
        return offload.device_of(hook)
    own = (*module._parameters.values(), *module._buffers.values())
    tensor = next((found for found in own if found is not None), None)
    if tensor is not None:
        return tensor.device
    parts = (part for part in module.modules() if part is not module)
    inner = next((part for part in parts if any(p is not None for p in part._parameters.values())), None)
    return torch.device("cpu") if inner is None else device_of(inner)


@contextmanager
def called_with(module: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Within, a call of the module computes with the parameters that it has then; its arguments, where it computes."""
    hook = offload.hook_of(module)
    if hook is not None:
        with offload.own_forward(module):
            yield offload.moved(hook, args), offload.moved(hook, kwargs)
        return
    # FSDP lays attributes over the parameters, which the module's forward would find before these
    views = {name: module.__dict__.pop(name) for name in module._parameters if name in module.__dict__}
    try:
        with tensor_parallel.own_forward(module):
            yield args, kwargs
    finally:
        module.__dict__.update(views)


def computed_elsewhere(module: nn.Module, name: str, path: str | None = None) -> Diagnostic:
    """The diagnostic for a change of a parameter that is none of the module's own."""
    what = f"`{name}` of a {type(module).__name__} is computed from other tensors, and cannot be changed itself"
    fix = "Make it a plain parameter (`remove_parametrizations`), or use a method that acts beside the layer."
    return rules.WEIGHT_ELSEWHERE(what, fix=fix, where=path)


# replacing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Original:
    """A parameter of a module as it was, and what brought its value then, if it was not there; or whatever else holds a weight."""

    parameter: Any
    kept: Mapping[str, Tensor] | None

    @property
    def is_elsewhere(self) -> bool:
        """Whether its value is not with the parameter."""
        return isinstance(self.parameter, Tensor) and self.parameter.is_meta and self.kept is not None

    def value(self, name: str, device: torch.device) -> Any:
        """The tensor itself, on a device if it is brought there; or what it is instead of one."""
        return self.kept[name].to(device) if self.kept is not None and self.is_elsewhere else self.parameter


#: a module's parameters as they were
State = Mapping[str, Original]


def state_of(module: nn.Module, names: Iterable[str] = ()) -> State:
    """The parameters of a module, and that it has none under a name that it could have, for `restore`; and what it has under
    other names."""
    kept = offload.kept(module)
    others = {name: Original(held_by(module, name), None) for name in names if name not in module._parameters}
    return {**{name: Original(parameter, kept) for name, parameter in module._parameters.items()}, **others}


def held_by(module: nn.Module, name: str) -> Any:
    """What a module has under a name: a parameter, a buffer or an attribute; None if nothing."""
    own = next((own for own in _held(module) if name in own), None)
    return None if own is None else own[name]


def _held(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module.__dict__


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Let a module have something under a name: where it has one, else as a parameter."""
    next((own for own in _held(module) if name in own), module._parameters)[name] = value


def change(module: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Let a module have other parameters: in place of its own, or where its hook brings them from; and other buffers and
    attributes that hold its weight."""
    kept = offload.kept(module)
    if kept is None:
        for name, value in parameters.items():
            _put(module, name, value)
        return
    for name, parameter in parameters.items():
        if module._parameters.get(name) is None:  # what is brought must have a place
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    offload.keep(module, offload.changed(kept, parameters))


def hand_over(module: nn.Module, name: str, parameter: nn.Parameter, value: Tensor | None) -> None:
    """Let a module have a parameter that another had. `value` is what was brought there, if the parameter has none."""
    if value is not None and offload.hook_of(module) is None:
        parameter = nn.Parameter(value, parameter.requires_grad)
    module._parameters[name] = parameter
    if offload.hook_of(module) is not None:
        change(module, {name: parameter if value is None else nn.Parameter(value, parameter.requires_grad)})


def fill(model: nn.Module, tensor: Tensor, value: Tensor, blocks: int = 1) -> None:
    """Give a tensor of a model a value, in place or where it is brought from. One that is larger has zeros beside it, in each
    of its `blocks`.

    Under `no_grad`. Raises `PeftcError` for a tensor without memory that nothing brings.
    """
    if not tensor.is_meta:
        keep_values(tensor)
        tensor.copy_(parallel.laid_out(padded(value.to(tensor.device), tensor.shape, blocks), tensor))
        return
    at = _offloaded(model, [tensor]).get(id(tensor))
    if at is None:
        what = "The tensor has no memory: it is on the meta device, and nothing brings its value"
        raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix="Give the model its weights first."))
    module, name = at
    made = nn.Parameter(torch.empty_like(_brought(module, name, tensor)), requires_grad=False)
    made.copy_(padded(value.to(made.device), made.shape, blocks))
    keep_brought(module)
    change(module, {name: made})


def share_brought(modules: Sequence[nn.Module], name: str) -> None:
    """Have hooks of several modules bring one tensor where they bring equal ones from memory; each file is one of its own."""
    values = [value for module in modules if (value := offload.held(module, name)) is not None]
    if len(values) < len(modules) or not all(torch.equal(values[0], other) for other in values[1:]):
        return
    for module, value in zip(modules, values, strict=True):
        if value.data_ptr() != values[0].data_ptr():
            keep_brought(module)
            change(module, {name: nn.Parameter(values[0], requires_grad=False)})


def keep_brought(module: nn.Module) -> None:
    """Keep from where a module's tensors are brought, for undoing."""
    kept = offload.kept(module)
    if kept is not None:
        note(offload.keep, module, kept)


def refuse_offloaded(model: nn.Module, tensors: Mapping[str, Tensor], why: str = "would be trained") -> None:
    """Raise `PeftcError` if tensors of the model, by name, are brought for calls: what becomes of them would be lost."""
    absent = _offloaded(model, tensors.values())
    lost = [name for name, tensor in tensors.items() if id(tensor) in absent]
    if lost:
        what = f"`{lost[0]}` {why}, but accelerate offloads it, and brings it from elsewhere for each call"
        fix = "Keep its module on a device (`device_map`), or leave it out of what the adapter changes."
        raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix=fix, where=lost[0]))


def restore(module: nn.Module, state: State) -> None:
    """Let a module have parameters that it had, whether they are brought now, were then, both or neither."""
    kept, here = offload.kept(module), torch.device("cpu")
    for name, own in state.items():
        if own.parameter is None or kept is None:
            value = own.value(name, here) if own.is_elsewhere else None
            again = own.parameter if value is None else nn.Parameter(value, own.parameter.requires_grad)
            _put(module, name, again)
        elif module._parameters.get(name) is None:
            module._parameters[name] = nn.Parameter(own.parameter.to("meta"), own.parameter.requires_grad)
    if kept is None:
        return
    before = next((own.kept for own in state.values() if offload.related(kept, own.kept)), None)
    if before is not None:
        offload.keep(module, before)
    values = {name: own.value(name, here) for name, own in state.items() if before is None or own.kept is not before}
    apart = {name: value for name, value in values.items() if value is not None}
    if apart:
        offload.keep(module, offload.changed(before or kept, apart))


def refuse_absent(module: nn.Module, path: str, why: str) -> None:
    """Raise `PeftcError` if parameters of a module have no memory, and nothing brings their values."""
    views = [(name, own) for name in elsewhere(module) if isinstance(own := module.__dict__.get(name), Tensor)]
    shards = [name for name, own in module._parameters.items() if own is not None and parallel.is_shard(own)]
    shards += [name for name, own in views if not parallel.is_whole(own, tuple(own.shape))]
    if shards:
        what = f"`{shards[0]}` of the layer is in shards, one of them here: {why}"
        raise PeftcError(
            rules.WEIGHT_ELSEWHERE(what, fix="Save the adapter, and merge it into a whole model.", where=path)
        )
    absent = [name for name, parameter in tensors_of(module).items() if parameter.is_meta]
    if absent:
        what = f"`{absent[0]}` of the layer is on the meta device, and nothing on the layer brings its value: {why}"
        fix = "Load the model without `device_map`, or offload it so that each layer has a hook of its own."
        raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix=fix, where=path))
