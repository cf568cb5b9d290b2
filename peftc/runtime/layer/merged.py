"""The parameters of a base layer with adapters folded in: what merging puts in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.runtime.layer.folding import adapted, opened, refuse_waiting
from peftc.runtime.layer.parts import Part, Under
from peftc.runtime.layer.sums import Sums, is_finite, is_sum


def merged_parameters(under: Under, parts: Sequence[Part], check: bool) -> dict[str, Any]:
    """What takes the place of base parameters, with the adapters folded in, by name; a bias too where the layer has none and an adapter adds a
    constant. The layer stays as it is. Raises `PeftcError` for adapters that wait for a token, and
    with `check` on NaN or infinity."""
    base, backend = under.inner, under.backend
    refuse_waiting(parts)
    with torch.no_grad():
        summed = _summed(under, parts, check)
        if summed is not None:
            return {"weight": summed}
        logical = adapted(under, parts)
        before = backend.opened(base)
        changed = {name: tensor for name, tensor in logical.items() if tensor is not before.get(name)}
        broken = [name for name, tensor in changed.items() if not is_finite(tensor)] if check else []
        if broken:
            raise PeftcError(not_finite(parts, "bias" if broken == ["bias"] else "weights"))
        return backend.replaced(base, changed, parts[0].path)


def _summed(under: Under, parts: Sequence[Part], check: bool) -> nn.Parameter | None:
    """The new weight where adapters do no more than add to one that is here: no other tensor of its size is made. Else None."""
    base, backend = under.inner, under.backend
    own = base._parameters.get("weight")
    if type(own) is not nn.Parameter or own.is_meta or backend.opens_anew:
        return None
    if not all(is_sum(part.tuner, part.parameter) for part in parts):
        return None
    running, pristine = opened(under)
    weight = backend.to_logical("weight", own.detach())
    if running["weight"].data_ptr() != weight.data_ptr():  # it is brought from elsewhere
        return None
    sums = Sums.of(parts, weight, next(iter(pristine.values())).dtype)
    if sums is None:
        return None
    made = torch.empty_like(own)
    if not sums.whole(sums.lying(weight), sums.lying(backend.to_logical("weight", made)), check):
        raise PeftcError(not_finite(parts, "weights"))
    return nn.Parameter(made, requires_grad=own.requires_grad)


def not_finite(parts: Sequence[Part], where: str) -> Diagnostic:
    """The diagnostic for a merge that comes to NaN or infinity."""
    names = ", ".join(part.view.adapter for part in parts)
    what = f"NaNs detected in the merged {where}. The adapter {names} seems to be broken"
    return rules.MERGE_NOT_FINITE(what, fix="Look at the adapter with `peftc inspect`.")
