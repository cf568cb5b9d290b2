"""Layer classes by the kind of their base layer, such as `Linear` in a method's subpackage of the reference.

peftc has one layer class per method, so these exist for `isinstance` only: an instance is a layer of the method round a
base layer of that kind.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from peftc.graph.nodes import LINEAR_KINDS, Kind


class _ByKind(type):
    """Asks the layer for its kind."""

    layer: type
    kinds: frozenset[Kind]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.layer) and vars(instance)["_kind"] in cls.kinds

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"`{cls.__name__}` is for `isinstance`; peftc makes its layers from a plan")


def kind_class(layer: type, name: str, kind: str) -> type:
    """The class `name` whose instances are layers of class `layer` round a base layer of that kind; always the same."""
    return _made(layer, name, kind)


@cache
def _made(layer: Any, name: str, kind: str) -> type:
    own = Kind(kind)
    cls = _ByKind(name, (), {"__doc__": f"A `{layer.__name__}` round a {kind} layer; for `isinstance`."})
    cls.layer = layer
    cls.kinds = LINEAR_KINDS if own in LINEAR_KINDS else frozenset({own})
    return cls
