"""What was gathered for a layer before an adapter begins there, such as statistics of its inputs: kept on the layer itself until
then, by the name of the start that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from peftc.runtime.journal import keep, keep_entries

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})
_ATTRIBUTE = "_peftc_gathered"


def gather(module: nn.Module, start: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors for a start on a layer; what was kept for it before is replaced."""
    keep(module)
    known = module.__dict__.get(_ATTRIBUTE, {})
    module.__dict__[_ATTRIBUTE] = {**known, start: dict(tensors)}


def gathered(module: nn.Module, start: str) -> Mapping[str, Tensor]:
    """What is kept for a start; empty if nothing is."""
    found: Mapping[str, Tensor] = module.__dict__.get(_ATTRIBUTE, _NOTHING).get(start, _NOTHING)
    return found


def let_go(module: nn.Module, start: str) -> None:
    """Forget what was kept for a start: it has begun."""
    known = module.__dict__.get(_ATTRIBUTE)
    if known is None:
        return
    keep(module)
    keep_entries(known)
    known.pop(start, None)
    if not known:
        del module.__dict__[_ATTRIBUTE]
