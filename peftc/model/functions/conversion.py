"""`convert_adapter`: an adapter of a live model as one of another method, with the error that this costs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import nn

from peftc import rules
from peftc.diagnostics import warn
from peftc.model.injected import adapters_of
from peftc.runtime.applying.conversion import Converted, converted
from peftc.runtime.layer.wrapper import TunerLayer

#: Relative errors up to this are rounding.
_ROUNDING = 1e-3


def convert_adapter(
    model: nn.Module, to: str, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> Converted:
    """A model's adapter as one of the PEFT type `to`, whose updates are thin; the model stays as it is.

    Each layer's change of its weight is replaced by the closest one of `rank`, or, if that is a fraction, of the smallest
    rank that keeps this share of its squared singular values. Warns if that is not exact: `errors` of the result has the
    relative errors by layer, `error` that of all. Adapters whose change is a thin product already are never made dense.

    Raises `PeftcError`: no such adapter, a rank that is none, an adapter that does more than change weights of layers, or
    layers that the other method cannot adapt.
    """
    made = converted(adapters_of(model), adapter_name, to, rank, _shown if progressbar else iter)
    if made.error > _ROUNDING:
        worst = max(made.errors, key=lambda path: made.errors[path])
        what = f"The changes differ by {made.error:.2%}, those of `{worst}` by {made.errors[worst]:.2%}"
        warn([rules.CONVERSION_LOSES(what, fix="Give a larger rank, or a larger share of the energy.")])
    return made


def _shown(layers: Sequence[TunerLayer]) -> Iterator[TunerLayer]:
    """The layers, with a line on stderr of how many are done."""
    for done, layer in enumerate(layers, 1):
        print(f"\rConverting layer {done} of {len(layers)}", end="", file=sys.stderr, flush=True)
        yield layer
    print(file=sys.stderr)
