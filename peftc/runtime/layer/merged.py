"""The parameters of a base layer with adapters folded in: what merging puts in their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.runtime.bases.places import computed_elsewhere
from peftc.runtime.layer.folding import adapted, refuse_waiting
from peftc.runtime.layer.parts import Part, Under


def merged_parameters(under: Under, parts: Sequence[Part], check: bool) -> dict[str, nn.Parameter]:
    """New base parameters with the adapters folded in, by name; a bias too where the layer has none and an adapter adds a
    constant. The layer stays as it is. Raises `PeftcError` for adapters that wait for a token, and
    with `check` on NaN or infinity."""
    base, backend = under.inner, under.backend
    refuse_waiting(parts)
    with torch.no_grad():
        logical = adapted(under, parts)
        before = backend.opened(base)
        changed = {name: tensor for name, tensor in logical.items() if tensor is not before.get(name)}
        broken = [name for name, tensor in changed.items() if not _is_finite(tensor)] if check else []
        if broken:
            names = ", ".join(part.view.adapter for part in parts)
            where = "bias" if broken == ["bias"] else "weights"
            what = f"NaNs detected in the merged {where}. The adapter {names} seems to be broken"
            raise PeftcError(rules.MERGE_NOT_FINITE(what, fix="Look at the adapter with `peftc inspect`."))
        result = {}
        for name, tensor in changed.items():
            if name not in base._parameters:
                raise PeftcError(computed_elsewhere(base, name, parts[0].path))
            own = base._parameters[name]
            if own is None:
                weight = base._parameters["weight"]
                assert weight is not None
                result[name] = nn.Parameter(tensor.to(weight.dtype), requires_grad=False)
            else:
                stored = backend.to_stored(name, tensor, own).to(own.dtype)
                if stored.stride() != own.stride():  # files and kernels want weights as they lay in memory before
                    stored = torch.empty_like(own, device=stored.device).copy_(stored)
                result[name] = nn.Parameter(stored, requires_grad=own.requires_grad)
        return result


def _is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity: a sum has one then. Where a sum is too large it is looked at number by number."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
