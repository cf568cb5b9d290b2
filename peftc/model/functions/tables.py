"""The reference's tables from PEFT type to class, as views of the registry: they have what is installed, when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from peftc.config.base import PeftConfig
from peftc.config.types import PeftType
from peftc.registry.manager import default_registry
from peftc.runtime.applying.classes import encoder_class, model_class
from peftc.tuner.method import TunerMethod

V = TypeVar("V")


class MethodTable(Mapping[PeftType, V]):
    """PEFT type -> what a method's record gives. Read-only; a type is loaded when it is looked up."""

    def __init__(self, value: Callable[[TunerMethod], V], holds: Callable[[TunerMethod], bool] | None = None) -> None:
        self._value = value
        self._holds = holds

    def __getitem__(self, peft_type: str) -> V:
        registry = default_registry()
        if peft_type not in registry.names:
            raise KeyError(peft_type)
        method = registry.get(str(peft_type))
        if self._holds is not None and not self._holds(method):
            raise KeyError(peft_type)
        return self._value(method)

    def __iter__(self) -> Iterator[PeftType]:
        registry = default_registry()
        for name in registry.names:
            if self._holds is None or self._holds(registry.get(name)):
                yield PeftType(name)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def _tuner(method: TunerMethod) -> type[nn.Module]:
    return encoder_class(method) if method.is_prompt else model_class(method)


#: PEFT type -> config class
PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[PeftType, type[PeftConfig]] = MethodTable(lambda method: method.config)
#: PEFT type -> the class that holds its adapters
PEFT_TYPE_TO_TUNER_MAPPING: Mapping[PeftType, type[nn.Module]] = MethodTable(_tuner)
#: the same for types that can share a model with adapters of others
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: Mapping[PeftType, Any] = MethodTable(_tuner, lambda method: method.adapts_layers)
#: PEFT type -> what the names of its slots begin with
PEFT_TYPE_TO_PREFIX_MAPPING: Mapping[PeftType, str] = MethodTable(
    lambda m: m.prefix, lambda method: bool(method.prefix)
)
