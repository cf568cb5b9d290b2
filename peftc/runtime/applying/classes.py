"""Empty subclasses for `isinstance`: each method's record names the class of its model or prompt encoders, made here on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import nn

from peftc.graph.targets import all_defaults
from peftc.registry.manager import default_registry
from peftc.runtime.applying.layer_classes import layer_class
from peftc.runtime.applying.tuner_model import TunerModel
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.prompt.encoder import PromptModule
from peftc.tuner.method import TunerMethod

_model_classes: dict[tuple[Any, ...], type[TunerModel]] = {}


def model_class(method: TunerMethod) -> type[TunerModel]:
    """The model class of a method."""
    name, table = method.model_class, method.default_targets.get("target_modules")
    methods = tuple(method.model_methods.items())
    key = (name, method.config, method.prefix, method.layer_class, methods, table, method.summary)
    if key not in _model_classes:
        _model_classes[key] = type(
            name,
            (TunerModel,),
            {
                **method.model_methods,
                "prefix": method.prefix,
                "tuner_layer_cls": layer_class(method) if method.layer_class else TunerLayer,
                "target_module_mapping": all_defaults(table) if table is not None else {},
                "__module__": __name__,
                "__doc__": method.summary,
            },
        )
    return _model_classes[key]


@cache
def _encoder_class(name: str, summary: str) -> type[PromptModule]:
    return type(name, (PromptModule,), {"__module__": __name__, "__doc__": summary})


def encoder_class(method: TunerMethod) -> type[PromptModule]:
    """The class of a method's prompt encoders."""
    return _encoder_class(method.encoder_class, method.summary) if method.encoder_class else PromptModule


#: role of a public name -> what makes the class
CLASSES: Mapping[str, Callable[[TunerMethod], type[nn.Module]]] = {
    "layer": layer_class,
    "model": model_class,
    "encoder": encoder_class,
}


def __getattr__(name: str) -> Any:
    """Pickles name these classes by this module: make the one asked for."""
    found = default_registry().find_name(name) if not name.startswith("_") else None
    if found is None or found[1] not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    method, role = found
    return CLASSES[role](method)
