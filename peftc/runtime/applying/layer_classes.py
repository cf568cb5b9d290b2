"""Empty subclasses of wrappers for `isinstance`: each method's record names the class of its layers, made here on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from peftc.compiler.plan.sites import MapSite
from peftc.registry.manager import Registry, default_registry
from peftc.runtime.around.modules import ModuleWrapper, wrapper_class
from peftc.runtime.layer.beside import RowsLayer
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.session import LayerFactory
from peftc.tuner.method import TunerMethod

#: By public name and what they have of the record: a method that is registered anew gets others.
_layer_classes: dict[tuple[Any, ...], type[TunerLayer]] = {}


def layer_class(method: TunerMethod) -> type[TunerLayer] | type[ModuleWrapper]:
    """The class of what a method puts round layers, or round modules, e.g. for `isinstance(module, ...)`."""
    return _layer_class(method) if method.adapts_layers else wrapper_class(method)


def _layer_class(method: TunerMethod) -> type[TunerLayer]:
    name, options = method.layer_class, tuple(method.layer_options.items())
    key = (name, method.config, method.layer_names, options, method.layer_dropout, method.summary)
    if key not in _layer_classes:
        shown = {attribute: _option(option) for attribute, option in method.layer_options.items()}
        if method.layer_dropout:
            shown |= {method.layer_dropout: property(TunerLayer.dropouts)}
        names = {
            "adapter_layer_names": method.layer_names,
            "dropout_name": method.layer_dropout or TunerLayer.dropout_name,
            "other_param_names": (*TunerLayer.other_param_names, *shown),
            "_all_available_adapter_names": _names,
            "__module__": __name__,
            "__doc__": method.summary,
        }
        _layer_classes[key] = type(name, (TunerLayer,), {**shown, **names})
    return _layer_classes[key]


def _option(option: str) -> property:
    """An option of all adapters of a layer."""
    return property(lambda layer: InForce(layer, lambda name: getattr(layer.site(name).config, option)))


def _names(layer: TunerLayer) -> list[str]:
    """What programs written for the reference ask a layer for."""
    return sorted(layer.adapters)


class InForce(Mapping[str, Any]):
    """Adapter of a layer -> what is in force there. Who keeps it sees adapters come and go; it is read and not written."""

    __slots__ = ("_layer", "_read")

    def __init__(self, layer: TunerLayer, read: Callable[[str], Any]) -> None:
        self._layer, self._read = layer, read

    def __getitem__(self, name: str) -> Any:
        if name not in self._layer.adapters:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.adapters)

    def __len__(self) -> int:
        return len(self._layer.adapters)

    def __repr__(self) -> str:
        return repr(dict(self))


def layer_factory(registry: Registry) -> LayerFactory:
    """What a session makes layers with."""

    classes: dict[str, type[TunerLayer]] = {}

    def make(peft_type: str, site: MapSite, base: nn.Module) -> TunerLayer:
        if site.inside:
            return RowsLayer(base, site)
        if peft_type not in classes:
            classes[peft_type] = _layer_class(registry.get(peft_type))
        return classes[peft_type](base, site)

    return make


def __getattr__(name: str) -> Any:
    """Pickles name these classes by this module: make the one asked for."""
    found = default_registry().find_name(name) if not name.startswith("_") else None
    if found is None or found[1] != "layer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return layer_class(found[0])
