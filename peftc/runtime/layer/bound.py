"""A layer's forward without gradients, where nothing stands between its tensors and their products: one token costs two
matrix–vector products beside the base's, and a few look-ups in dictionaries.

Bound are the places of tensors and never these, so that one that is assigned, cast, exchanged or swapped for a call is seen, as
is every hook. Where anything is out of the ordinary, the general path computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, mv, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling

from peftc.host.torch_modules import GLOBAL_FORWARD_HOOKS, forward_hooks
from peftc.ops.lowrank import add_update, down
from peftc.runtime.layer.parts import Part, Path, Under
from peftc.runtime.layer.stored import places_of

#: where a module, or a dictionary of tensors, was put, under which name; itself, and a module's attributes
Watched = tuple[dict[str, Any], str, Any, dict[str, Any]]

#: tensors that compute as they are, and not by a class of their own
_ORDINARY = (nn.Parameter, Tensor)


def can_bind(under: Under, parts: Sequence[Part]) -> bool:
    """Whether these adapters are one with a thin update that goes into the fresh output of a linear layer."""
    if len(parts) != 1 or under.base is not under.inner or not under.backend.is_plain_linear:
        return False
    (part,) = parts
    drops = part.dropout is None or isinstance(part.dropout, nn.Module)
    return drops and "thin" in part.tuner.lowerings and part.modules is None and part.view.is_live


def bound(general: Path, under: Under, part: Part, watched: Sequence[Watched], hookable: Iterable[nn.Module]) -> Path:
    """The general path with a short way beside it, for an adapter that can be bound.

    The short way is closed while one of what is watched is not where it was put or has a forward of its own, and while the base
    or one of the hookable modules has a hook. The method is asked which slots its factors are by the first call that could go
    it, and again for another dtype.
    """
    #: all that a call looks at, in one tuple: between the weights of two layers what lies apart in memory is what costs
    held: tuple[Any, ...] | None = None

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal held
        if is_grad_enabled() or is_compiling() or type(x) is not Tensor or args or kwargs:
            return general(x, *args, **kwargs)
        if _get_tracing_state():
            return general(x)
        if not held:
            if held is None and not part.view.training:  # else the method may draw, once more than it should
                held = _held(under.base, part, watched, hookable)
            return general(x)
        base, state, hooks, first, a, second, b, dtype, fixed, owner, adapter, size, dropout, pair, rest = held
        home, name, own, attributes, home2, name2, own2, attributes2 = pair
        if any(hooks) or any(GLOBAL_FORWARD_HOOKS) or "forward" in state:
            return general(x)
        if home.get(name) is not own or home2.get(name2) is not own2:
            return general(x)
        if "forward" in attributes or "forward" in attributes2 or (rest and not _is_plain(dropout, rest)):
            return general(x)
        A, B, scale = first.get(a), second.get(b), owner["scaling"].get(adapter) if fixed is None else fixed
        if type(A) not in _ORDINARY or type(B) not in _ORDINARY or type(scale) is not float or A.is_meta or B.is_meta:
            return general(x)
        if A.dtype is not dtype or B.dtype is not dtype:
            held = None
            return general(x)
        parameters = state["_parameters"]
        weight = parameters.get("weight")
        if type(base) is nn.Linear and type(weight) in _ORDINARY and "bias" in parameters:
            y = F.linear(x, weight, parameters["bias"])
        else:
            y = base(x)
        if x.numel() == size and x.dtype is dtype and y.dtype is dtype:  # one token
            y.view(-1).addmv_(B, mv(A, x.view(-1)), alpha=scale)
        else:
            add_update(y, down(x, A), B, scale)
        return y

    return run


def _is_plain(dropout: nn.Module | None, watched: Iterable[Watched]) -> bool:
    """Whether nothing is dropped, and what is watched is as it was."""
    if dropout is not None and dropout.training:
        return False
    return all(home.get(name) is own and "forward" not in attributes for home, name, own, attributes in watched)


def _held(base: nn.Module, part: Part, watched: Sequence[Watched], hookable: Iterable[nn.Module]) -> tuple[Any, ...]:
    """What a call looks at on the short way; empty if the method's factors are not stored as they are."""
    view, dropout = part.view, part.dropout
    found = places_of(part)
    if found is None:
        return ()
    first, a, *_ = found
    hooks = tuple(own for module in (base, *hookable) for own in forward_hooks(module))
    one, two, *rest = watched if len(watched) > 1 else (*watched, *watched)
    if dropout is not None:  # looked at with the rest, of which there must be some
        rest = [*rest, one]
    others = (vars(view.owner), view.adapter, first[a].shape[1], dropout)
    return base, vars(base), hooks, *found, *others, (*one, *two), tuple(rest)
