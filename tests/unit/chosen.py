"""Methods that tests take for what they can do, so that none of them is named and the order of the registry decides nothing."""

from __future__ import annotations

from peftc.config.mixins import TargetsMixin
from peftc.registry.manager import default_registry
from peftc.tuner.method import TunerMethod
from tests.unit.plans import linear


def plain_method() -> TunerMethod:
    """The first method on linear layers that is content with a list of targets and no further option."""
    registry = default_registry()
    return next(method for name in registry.names if _is_plain(method := registry.get(name)))


def _is_plain(method: TunerMethod) -> bool:
    """Whether it says nothing of its defaults, alone and on a layer."""
    if not method.adapts_layers or not issubclass(method.config, TargetsMixin):
        return False
    if method.needed({}):
        return False
    config, layer = method.config(target_modules=["layer"]), linear(8, 8)
    tuners = [tuner for tuner in method.map_tuners if layer.kind in tuner.supports]
    return bool(tuners) and not [*method.check(config), *tuners[0].check(config, layer, "layer")]
