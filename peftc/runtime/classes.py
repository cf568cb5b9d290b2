"""Empty subclasses for `isinstance`: each method's record names a layer class and a model class, made here on demand."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from peftc.compiler.plan import MapSite
from peftc.registry.manager import Registry, default_registry
from peftc.runtime.layer import TunerLayer
from peftc.runtime.modules import ModuleWrapper, wrapper_class
from peftc.runtime.session import LayerFactory
from peftc.tuner.method import TunerMethod


class TunerModel(nn.Module):
    """The level between a `PeftModel` and its base: it puts `model.` into every name. Final but for empty subclasses."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


_layer_classes: dict[str, type[TunerLayer]] = {}


def layer_class(method: TunerMethod) -> type[TunerLayer] | type[ModuleWrapper]:
    """The class of what a method puts round layers, or round modules, e.g. for `isinstance(module, ...)`."""
    return _layer_class(method) if method.adapts_layers else wrapper_class(method)


def _layer_class(method: TunerMethod) -> type[TunerLayer]:
    name = method.layer_class
    if name not in _layer_classes:
        names = {"adapter_layer_names": method.layer_names, "__module__": __name__, "__doc__": method.summary}
        _layer_classes[name] = type(name, (TunerLayer,), names)
    return _layer_classes[name]


@cache
def _model_class(name: str, summary: str) -> type[TunerModel]:
    return type(name, (TunerModel,), {"__module__": __name__, "__doc__": summary})


def model_class(method: TunerMethod) -> type[TunerModel]:
    """The model class of a method."""
    return _model_class(method.model_class, method.summary)


def layer_factory(registry: Registry) -> LayerFactory:
    """What a session makes layers with."""

    def make(peft_type: str, site: MapSite, base: nn.Module) -> TunerLayer:
        return _layer_class(registry.get(peft_type))(base, site)

    return make


def __getattr__(name: str) -> Any:
    """Pickles name these classes by this module: make the one asked for."""
    found = default_registry().find_name(name) if not name.startswith("_") else None
    if found is None or found[1] not in ("layer", "model"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    method, role = found
    return layer_class(method) if role == "layer" else model_class(method)
