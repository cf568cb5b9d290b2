"""`reduce_intruders`: an adapter beside another one, which does the same and makes the model forget less."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.model.peft_model import PeftModel
from peftc.runtime.applying.intruders import Mitigation, reduced
from peftc.runtime.applying.tuner_model import TunerModel
from peftc.runtime.journal import whole


@whole
def reduce_intruders(
    model: nn.Module,
    adapter_name: str = "default",
    new_name: str = "intruder_reduced",
    *,
    top_k: int = 10,
    threshold: float = 0.5,
    scale: float = 0.75,
    tell: Callable[[str], object] | None = None,
) -> Mapping[str, int]:
    """Add an adapter that is another one with less of its intruder dimensions, and activate it alone; trainable, as by
    `set_adapter`. Returns how many intruders each layer had, by path.

    Of the first `top_k` left singular vectors of `W + ΔW`, intruders are those whose cosines with the ones of `W` are all below
    `threshold`; `scale` of each is left. On any method whose updates are thin products; convolutions count as matrices, experts are
    taken one by one. `tell` hears of each layer. Raises `PeftcError`, with nothing changed.
    """
    level = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(level, TunerModel):
        what = f"This {type(model).__name__} has no adapter on layers"
        raise PeftcError(rules.CANNOT_CONVERT(what, fix="Give the `PeftModel` of an adapter that changes weights."))
    how = Mitigation(top_k, threshold, scale)
    found = reduced(level.session, adapter_name, new_name, how, tell or _nothing)
    level.add_combined(new_name, found.made, found.is_wide)
    if tell is not None:
        tell(f"Enabling new adapter {new_name}")
    level.set_adapter(new_name)
    return found.intruders


def _nothing(text: str) -> None:
    """Tell nobody."""
