"""Adapters in the base weights: folded in, set aside while they are not to act, and taken out again.

A base layer has one set of parameters in place at a time. Every wrapper round it keeps what it found when it merged, and,
while its adapters are switched off, what it made of it; so each state comes back bit for bit, with the same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.runtime.journal import Journal

if TYPE_CHECKING:
    from peftc.runtime.call import Shared
    from peftc.runtime.layer import TunerLayer
    from peftc.runtime.paths import Part, Under

#: the parameters of a layer by name
Parameters = dict[str, nn.Parameter]


class MergeState(NamedTuple):
    """What a wrapper has merged, what it found and made, whether that is set aside, and the base layer's parameters."""

    merged: list[str]
    pristine: Parameters
    folded: Parameters
    is_aside: bool
    in_place: Mapping[str, nn.Parameter | None]


class Merging(nn.Module):
    """The part of a layer's wrapper that is about merging."""

    merged_adapters: list[str]
    #: parameters that merging replaced, as this wrapper found them, and those that it put there, while they are set aside
    _pristine: Parameters
    _folded: Parameters
    _is_aside: bool
    _active: tuple[str, ...]
    _disabled: bool
    _parts: dict[str, Part]
    _shared: Shared
    _under: Under
    #: the wrapper round this one
    _outer: ReferenceType[TunerLayer] | None

    # given by the layer -------------------------------------------------------------------------------------------

    def chain(self) -> list[TunerLayer]:
        raise NotImplementedError

    def get_base_layer(self) -> nn.Module:
        raise NotImplementedError

    def merged_parameters(self, names: Sequence[str], check: bool = False) -> Parameters:
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        raise NotImplementedError

    def _choose_path(self) -> None:
        raise NotImplementedError

    # merging ------------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters into the base weights, those of wrappers below first. Raises `PeftcError`, with nothing changed,
        with `safe_merge` on NaN or infinity, and where an adapter below would act after one that it now acts before.

        The base's own parameter objects are kept aside, so that `unmerge` restores them bit for bit. While adapters are
        switched off they are merged and set aside.
        """
        chain, own = self._outermost().chain(), len(self.chain())
        wanted = [layer._to_merge(adapter_names) if place < own else [] for place, layer in enumerate(chain)]
        first = next((place for place, names in enumerate(wanted) if names), None)
        if first is None:
            return
        off = [layer for layer in chain if layer.disable_adapters]
        with Journal() as journal:
            for layer in off:
                journal.note(layer.enable_adapters, False)
                layer.enable_adapters(True)
            for layer in chain:
                journal.note(layer.restore_merge, layer.merge_state())
            again = [layer._take_out() for layer in reversed(chain[first + 1 :])]  # what lies over it is folded in anew
            for layer, names, new in zip(chain[first:], [[], *reversed(again)], wanted[first:], strict=True):
                layer._merge_own(safe_merge, [*names, *new])
            for layer in off:
                layer.enable_adapters(False)

    def _to_merge(self, wanted: Sequence[str] | None) -> list[str]:
        wanted = self._active if wanted is None else wanted
        return [name for name in wanted if name in self._parts and name not in self.merged_adapters]

    def _merge_own(self, check: bool, names: Sequence[str]) -> None:
        if not names:
            return
        self._refuse_order(names)
        base = self.get_base_layer()
        for name, parameter in self.merged_parameters(names, check).items():
            own = base._parameters[name]
            assert own is not None
            self._pristine.setdefault(name, own)
            base._parameters[name] = parameter
        self.merged_adapters.extend(names)
        self._shared.merges = True
        self._choose_path()

    def _refuse_order(self, names: Sequence[str]) -> None:
        """Merged, these act before what is pending below: only sums may change places."""
        below = self._under.between()
        own = [self._parts[name] for name in names]
        if not below or all(part.tuner.additive for part in (*below, *own)):
            return
        where, first = own[0].path, ", ".join(f"`{part.view.adapter}`" for part in below)
        what = f"Merging {', '.join(f'`{name}`' for name in names)} alone would change places with {first}"
        fix = f"Merge {first} as well, or deactivate it before."
        raise PeftcError(rules.MERGE_ORDER(what, fix=fix, where=where))

    def unmerge(self) -> None:
        """Put the base's own parameters back; wrappers below unmerge as well, since what they merged lies beneath. What
        others merged over it is folded in anew."""
        chain, own = self._outermost().chain(), len(self.chain())
        again = [layer._take_out() for layer in reversed(chain)]
        for layer, names in zip(chain[own:], again[::-1][own:], strict=True):
            layer._merge_own(False, names)
        self.settle()

    def _take_out(self) -> list[str]:
        """Put back what this wrapper found; returns what it had merged."""
        names = self.merged_adapters
        if names:
            self.restore_merge(MergeState([], {}, {}, False, dict(self._pristine)))
        return names

    def merge_state(self) -> MergeState:
        """What `restore_merge` needs."""
        in_place = dict(self.get_base_layer()._parameters)
        return MergeState(
            list(self.merged_adapters), dict(self._pristine), dict(self._folded), self._is_aside, in_place
        )

    def restore_merge(self, state: MergeState) -> None:
        """Go back to what was merged then."""
        self.merged_adapters, self._pristine, self._folded, self._is_aside, in_place = state
        self.get_base_layer()._parameters.update(in_place)
        self._choose_path()

    # switched off -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Have the weights in place that belong there: with what was merged by wrappers whose adapters act, up to the first
        whose do not. What is merged further out acts beside the weights meanwhile."""
        merged = [layer for layer in self._outermost().chain() if layer.merged_adapters]
        acting = next((place for place, layer in enumerate(merged) if layer.disable_adapters), len(merged))
        changed = [layer for place, layer in enumerate(merged) if layer._is_aside is (place < acting)]
        for layer in reversed(merged[acting:]):
            layer._set_aside()
        for layer in merged[:acting]:
            layer._put_in()
        for layer in changed:
            layer._choose_path()

    def _outermost(self) -> TunerLayer:
        outer = self._outer() if self._outer is not None else None
        return cast("TunerLayer", self) if outer is None else outer._outermost()

    def _set_aside(self) -> None:
        if not self._is_aside:
            in_place = self.get_base_layer()._parameters
            self._folded = {name: parameter for name in self._pristine if (parameter := in_place[name]) is not None}
            in_place.update(self._pristine)
            self._is_aside = True

    def _put_in(self) -> None:
        if self._is_aside:
            self.get_base_layer()._parameters.update(self._folded)
            self._folded, self._is_aside = {}, False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts and moves reach the weights that are not in place as well."""
        in_place = self.get_base_layer()._parameters
        out = [(kept, n, p) for kept in (self._pristine, self._folded) for n, p in kept.items() if in_place[n] is not p]
        super()._apply(fn, recurse)
        for kept, name, parameter in out:
            with torch.no_grad():
                data: Any = fn(parameter.data)
            if data.is_meta is parameter.is_meta:
                parameter.data = data
            else:  # which is another kind of tensor
                kept[name] = nn.Parameter(data, parameter.requires_grad)
        return self
