"""Layer classes by what they wrap, such as `Linear` or `Linear4bit` in a method's subpackage of the reference.

peftc has one layer class per method, so these exist for `isinstance` only: an instance is a layer of the method round a
base layer of that kind, or of that class of a library for quantisation. `layers.json` beside this file has the names that
only some subpackages have, and the further modules of a subpackage: those that such layers, or functions of the method, are in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from peftc.graph.nodes import LINEAR_KINDS, Kind

#: names of layer classes that the reference has for most methods
USUAL: Mapping[str, Mapping[str, str]] = {
    "Linear": {"kind": "linear"},
    "Embedding": {"kind": "embedding"},
    "Conv1d": {"kind": "conv1d"},
    "Conv2d": {"kind": "conv2d"},
    "Conv3d": {"kind": "conv3d"},
}


@cache
def _data() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, Any] = json.loads(files("peftc.compat").joinpath("layers.json").read_text(encoding="utf-8"))
    return found


def names_in(subpackage: str) -> Mapping[str, Mapping[str, str]]:
    """Name of a layer class in a method's subpackage -> what such a layer wraps."""
    own = {name: said for name, said in _data().get(subpackage, {}).items() if name != "parts"}
    return {**USUAL, **own}


def parts_of(subpackage: str) -> tuple[str, ...]:
    """Modules of a method's subpackage, beside those that all have."""
    return tuple(_data().get(subpackage, {}).get("parts", ()))


class _ByBase(type):
    """Asks the layer what it wraps."""

    layer: type
    wraps: Callable[[Any], bool]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.layer) and cls.wraps(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"`{cls.__name__}` is for `isinstance`; peftc makes its layers from a plan")


@cache
def class_of(layer: Any, subpackage: str, name: str) -> type:
    """The class `name` of a subpackage, whose instances are layers of class `layer`; always the same. Raises `KeyError`."""
    said = names_in(subpackage)[name]
    what = f"a {said['kind']} layer" if "kind" in said else "a layer of the class that it is named after"
    cls = _ByBase(name, (), {"__doc__": f"A `{layer.__name__}` round {what}; for `isinstance`."})
    cls.layer = layer
    cls.wraps = _of_kind(said["kind"]) if "kind" in said else _of_base(said["base"])
    return cls


def _of_kind(kind: str) -> Callable[[Any], bool]:
    if kind == "parameter":
        return lambda layer: bool(layer.parameter)
    own = Kind(kind)
    kinds = LINEAR_KINDS if own in LINEAR_KINDS else frozenset({own})
    return lambda layer: vars(layer)["_kind"] in kinds


def _of_base(pattern: str) -> Callable[[Any], bool]:
    """By the full name of the base layer's class, or of its weight's: some libraries replace the one, some the other."""
    wanted = re.compile(pattern)

    def wraps(layer: Any) -> bool:
        base = layer.get_base_layer()
        classes = [type(base), type(base._parameters.get("weight"))]
        return any(wanted.fullmatch(f"{cls.__module__}.{cls.__qualname__}") for cls in classes)

    return wraps
