"""What is read off a layer by who passes its forward over, as torch's kernels for attention and encoder layers do: the
parameters with the adapters in effect folded in, differentiable in their slots."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftc import rules
from peftc.diagnostics import PeftcError, Severity
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.call import Shared
from peftc.runtime.layer.folding import adapted_as_trained
from peftc.runtime.layer.parts import Part, Under

#: Lowerings that change a weight and nothing else.
_OF_WEIGHTS = frozenset({"thin", "vectors"})


def as_read(under: Under, parts: Sequence[Part], shared: Shared, name: str) -> Tensor | None:
    """A parameter of the base layer, stored, with `parts` in effect. The parameter itself where they do not change it.

    Raises `PeftcError` where they act otherwise than by changing parameters of the layer for all rows alike.
    """
    if name not in under.inner._parameters:
        other: Tensor = getattr(under.inner, name)  # whose error says that there is none
        return other
    own = tensor_of(under.inner, name)
    if own is None or not parts or not any(_may_change(part, name) for part in parts):
        return own
    _refuse(parts, shared)
    logical = adapted_as_trained(under, parts)[name]
    return under.backend.to_stored(name, logical, own).to(own.dtype)


def _may_change(part: Part, name: str) -> bool:
    if part.parameter:
        return part.parameter == name
    given = part.tuner.lowerings
    return name == "weight" or "params" in given or not given & _OF_WEIGHTS


def _refuse(parts: Sequence[Part], shared: Shared) -> None:
    path, names = parts[0].path, {part.view.adapter for part in parts}
    beside = next((part for part in parts if not part.tuner.is_mergeable), None)
    if beside is not None:
        what = f"`{path}` is read by the module around it, and {beside.view.config.peft_type} acts beside the layer"
        fix = "Switch torch's kernel off, `torch.backends.mha.set_fastpath_enabled(False)`; leave out a layer called `out_proj`."
        raise PeftcError(rules.READ_DIRECTLY(what, fix=fix, where=path, severity=Severity.ERROR))
    if shared.call is not None and shared.call.adapters:
        what = f"`{path}` is read by the module around it, which computes all rows at once"
        raise PeftcError(rules.ROWS_DIFFER(what, fix="Call the model once for each adapter.", where=path))
    if not shared.gated.isdisjoint(names):
        what = f"`{path}` is read by the module around it, which knows no coefficients"
        raise PeftcError(rules.CANNOT_GATE(what, fix="Exclude it where the adapters are trained.", where=path))
