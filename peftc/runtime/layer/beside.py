"""The wrapper of rows that train beside a method: their tensors are in a module of its own inside, as the ecosystem has it.

It is like every other but for that, and there is one for all methods, directly round the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import nn

from peftc.compiler.plan.sites import MapSite
from peftc.runtime.journal import keep, keep_entry
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.tuner.rows import DELTA, ROWS_MODULE


class RowsRoom(nn.Module):
    """Holds the rows of all adapters: `token_adapter` in names of parameters."""

    dropout_name: ClassVar[str] = TunerLayer.dropout_name


class RowsLayer(TunerLayer):
    """An embedding, or another layer with a row for each token, some rows of which train."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = (f"{ROWS_MODULE}.{DELTA}",)

    def __init__(self, base_layer: nn.Module, site: MapSite) -> None:
        super().__init__(base_layer, site)
        self._modules[site.inside] = RowsRoom()

    def _get_name(self) -> str:
        return f"rows.{self._kind.value.capitalize()}"

    @property
    def room(self) -> nn.Module:
        room = self._modules.get(self.spot)
        return self if room is None else room  # while it is made


def slip_under(outermost: TunerLayer, wrap: Callable[[nn.Module], TunerLayer]) -> TunerLayer:
    """Put a new wrapper directly round a base layer, below all that are round it."""
    chain = outermost.chain()
    children = chain[0]._modules
    keep_entry(children, "base_layer")
    made = wrap(outermost.get_base_layer())
    made.training = outermost.training
    children["base_layer"] = made
    for wrapper in chain:
        keep(wrapper)
        wrapper._nest()
        wrapper._choose_path()
    return made
