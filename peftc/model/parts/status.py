"""What state each wrapper of a model is in, and the model as a whole; `"irregular"` where wrappers contradict each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.host.layers import is_pretrained
from peftc.runtime.applying.tuner_model import TunerModel
from peftc.runtime.around.saved_modules import ModulesToSaveWrapper
from peftc.runtime.bases.storages import packed_facts, storage_of
from peftc.runtime.layer.wrapper import TunerLayer

T = TypeVar("T")

Irregular = Literal["irregular"]
IRREGULAR: Irregular = "irregular"


@dataclass
class TunerLayerStatus:
    """One wrapper. `requires_grad` and `devices` are by adapter; both look at the adapters' own tensors."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All wrappers of a model together."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every wrapper of a `PeftModel`, or of a model adapted in place, in the order of the modules.

    Names are paths below the model, below `base_model` for a `PeftModel`. Raises `PeftcError` if there is no wrapper, as
    with a prompt.
    """
    root = _level(model) or model
    found = [
        _status(name, module)
        for name, module in root.named_modules()
        if isinstance(module, TunerLayer | ModulesToSaveWrapper)
    ]
    if not found:
        what = f"No layer of this {type(model).__name__} has an adapter"
        fix = "Adapt it first; an adapter that acts on the input, or on whole modules, has no layers to tell about."
        raise PeftcError(rules.NOT_ADAPTED(what, fix=fix))
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a `PeftModel`, or of a model adapted in place. Raises `PeftcError` if no layer has an adapter."""
    layers = get_layer_status(model)
    level = _level(model)
    base = model if level is None else level.model
    trainable, total = counted(model)
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & {*layer.available_adapters} - {*layer.merged_adapters} for layer in layers)
    active = _common(tuple(layer.active_adapters) for layer in layers)
    return TunerModelStatus(
        base_model_type=type(base).__name__ if level is not None or is_pretrained(model) else "other",
        adapter_model_type="None" if level is None else type(level).__name__,
        peft_types={} if level is None else {name: str(c.peft_type) for name, c in level.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=active if active == IRREGULAR else list(active),
        merged_adapters=IRREGULAR if partly else sorted(merged),
        requires_grad={k: _agreed(v) for k, v in _gathered(layer.requires_grad.items() for layer in layers).items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({device for devices in found for device in devices})
            for name, found in _gathered(layer.devices.items() for layer in layers).items()
        },
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def counted(model: nn.Module) -> tuple[int, int]:
    """`(trainable, all)` parameters; a shared tensor counts once, and a packed weight as many as it has opened."""
    trainable = total = 0
    seen: set[int] = set()
    for module in model.modules():
        packed = packed_facts(module)
        if packed is not None:
            total += packed.in_features * packed.out_features
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or (packed is not None and name != "bias"):
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def _level(model: nn.Module) -> TunerModel | None:
    """The level below a `PeftModel` that wraps layers."""
    level = model._modules.get("base_model")
    return level if isinstance(level, TunerModel) else None


def _status(name: str, module: TunerLayer | ModulesToSaveWrapper) -> TunerLayerStatus:
    tensors = _gathered([_tensors(module)])
    return TunerLayerStatus(
        name=name,
        module_type=module._get_name(),
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=list(module.merged_adapters),
        requires_grad={adapter: _agreed([p.requires_grad for p in own]) for adapter, own in tensors.items()},
        available_adapters=sorted(tensors),
        devices={adapter: sorted({p.device.type for p in own}) for adapter, own in tensors.items()},
        quantization_backend=_storage(module),
    )


def _storage(module: TunerLayer | ModulesToSaveWrapper) -> str | None:
    """How the base weight is stored, in the reference's word for it; it names that for some methods alone."""
    storage = storage_of(module.get_base_layer()) if isinstance(module, TunerLayer) else None
    return None if storage is None else storage.known_as or storage.name


def _tensors(module: TunerLayer | ModulesToSaveWrapper) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a wrapper that belongs to an adapter, trainable or not, with the adapter's name."""
    if isinstance(module, TunerLayer):
        for adapter in module.adapters:
            for _, parameter in module.parameters_of(adapter):
                yield adapter, parameter
    else:
        for adapter in module.modules_to_save:
            for parameter in module.parameters_of(adapter):
                yield adapter, parameter


def _gathered(pairs: Iterable[Iterable[tuple[str, T]]]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for some in pairs:
        for key, value in some:
            found.setdefault(key, []).append(value)
    return found


def _common(values: Iterable[T]) -> T | Irregular:
    """The value that all have."""
    found = set(values)
    return found.pop() if len(found) == 1 else IRREGULAR


def _agreed(values: Sequence[bool | Irregular]) -> bool | Irregular:
    return values[0] if all(value == values[0] for value in values) else IRREGULAR
